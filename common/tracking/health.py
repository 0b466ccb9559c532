"""What a run's own numbers say is going wrong, with likely causes: for the terminal, the log and the report.

Everything comes from the rows of ``metrics.jsonl``, so that a report of a killed run finds what the live run found. A
sign must hold for ``LOOKED_AT`` steps in a row, or for the whole of a shorter run. Left out: what stops a run at once
(a loss that is not finite, a proof that fails). Used by deploy/run.py and deploy/report.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
LOOKED_AT = 3
"""Steps that a sign must last."""
EQUAL_GROUPS = 128
"""Groups in a row without signal that say that a run learns no more, once it has learned: late in a run that does well
nine in ten agree, and with few prompts a step whole steps of them do."""
MANY = 0.9
"""The share of completions cut at the limit that is too many."""
FAILED = 0.25
"""The share of groups lost to failing rewards that is too many."""
FLAT_NATS = 0.02
"""Entropy (nats a token) below which nothing new is tried, if it began ten times as high."""
APART_NATS = 0.1
"""Mean |sampler - learner| log-prob of the sampled tokens that no rounding explains, if it has doubled."""


class Finding(NamedTuple):
    """A sign, once for each kind."""

    kind: str
    step: int
    """The step from which it was seen."""
    text: str
    """What was measured, and likely causes."""


def findings(rows: Sequence[Row], finished: bool = False) -> list[Finding]:
    """What is wrong in these steps (in order), each kind once, at the first step where it showed.

    ``finished``: no more will come, so that a run shorter than ``LOOKED_AT`` is judged by what it has.
    """
    watch = Watch()
    found = [finding for row in rows for finding in watch.add(row)]
    return found + (watch.finish() if finished else [])


class Watch:
    """The same, a step at a time."""

    def __init__(self) -> None:
        self._steps = self._updates = 0
        self._last: deque[Row] = deque(maxlen=LOOKED_AT)
        self._first_update: Row = {}
        self._last_updates: deque[Row] = deque(maxlen=LOOKED_AT)
        self._found: set[str] = set()
        self._equal_groups, self._had_signal = 0.0, False

    def add(self, row: Row) -> list[Finding]:
        """What is to be seen from this step on."""
        self._steps += 1
        self._last.append(row)
        equal = row.get("zero_variance_fraction") == 1
        self._equal_groups = self._equal_groups + (row.get("groups_sampled") or 0) if equal else 0.0
        self._had_signal |= not equal
        if row.get("entropy") is not None:
            self._first_update = self._first_update or row
            self._updates += 1
            self._last_updates.append(row)
        return self._look() if self._steps >= LOOKED_AT else []

    def finish(self) -> list[Finding]:
        return self._look() if 0 < self._steps < LOOKED_AT else []

    def _look(self) -> list[Finding]:
        signs = {kind: sign(self._last) for kind, sign in _OF_STEPS.items()}
        if self._had_signal and self._equal_groups < EQUAL_GROUPS:
            signs["rewards all equal"] = ""
        if self._updates > min(LOOKED_AT, self._steps - 1):  # the first is what the others are compared with
            signs |= {kind: sign(self._first_update, self._last_updates) for kind, sign in _OF_UPDATES.items()}
        new = [Finding(kind, int(self._last[-1]["step"]), text) for kind, text in signs.items() if text]
        new = [finding for finding in new if finding.kind not in self._found]
        self._found |= {finding.kind for finding in new}
        return new


def unlearned(rows: Sequence[Row]) -> str:
    """Why the whole run has changed nothing, or nothing if it has changed something."""
    if rows and all(row.get("loss") is None or row.get("grad_norm") == 0 for row in rows):
        return f"nothing was learned, because no group of its {len(rows)} steps carried a gradient"
    return ""


def _flat_rewards(last: Collection[Row]) -> str:
    if not all(row.get("zero_variance_fraction") == 1 for row in last):
        return ""
    reward, cut = _mean(last, "reward_mean"), _mean(last, "truncated_fraction")
    causes = [
        "the task is too hard or too easy for this model",
        "the prompt does not ask for the form that the reward reads",
        "the reward is constant",
    ]
    if cut > 0.5:
        causes.insert(0, f"answers are cut before they end ({cut:.0%} at sampler.max_tokens)")
    return (
        f"the completions of each prompt all earned the same (mean reward {reward:.3g}): nothing is learned. Likely: "
        f"{'; '.join(causes)}. Look at rollouts/ (run.rollouts_every)"
    )


def _cut(last: Collection[Row]) -> str:
    if not all((row.get("truncated_fraction") or 0) >= MANY for row in last):
        return ""
    return (
        f"{_mean(last, 'truncated_fraction'):.0%} of the completions are cut at sampler.max_tokens. Likely: it is too "
        "low for this task; or the model does not end its turns (a base model, or another chat template than it knows: "
        "a string in sampler.stop ends them)"
    )


def _entropy(at_first: Row, updates: Collection[Row]) -> str:
    first, last = at_first["entropy"], [row["entropy"] for row in updates]
    if max(last) >= min(FLAT_NATS, first / 10):
        return ""
    return (
        f"the model's entropy has gone from {first:.3g} to {last[-1]:.3g} nats a token: it writes one answer and tries "
        "nothing new. Likely: optimizer.lr is too high; or the task is learned. Raise learner.clip_high or "
        "learner.entropy_coef, or stop earlier"
    )


def _apart(at_first: Row, updates: Collection[Row]) -> str:
    first, last = (at_first.get("logprob_diff_mean") or 0), [row.get("logprob_diff_mean") or 0 for row in updates]
    if min(last) <= max(APART_NATS, 2 * first):
        return ""
    return (
        f"sampler and learner differ by {last[-1]:.3g} nats on the sampled tokens, {first:.3g} at first. Likely: "
        "optimizer.lr is too high; train.max_staleness lets the weights run ahead; or sampler.top_p or top_k cuts what "
        "the learner gives weight to"
    )


def _failing_rewards(last: Collection[Row]) -> str:
    lost = sum(row.get("groups_skipped_reward_error") or 0 for row in last)
    asked = lost + sum(row.get("groups_sampled") or 0 for row in last)
    if not asked or lost / asked < FAILED:
        return ""
    return f"{lost:.0f} of {asked:.0f} groups were left out, because a reward failed on them; run.log says how"


_OF_STEPS: Mapping[str, Callable[[Collection[Row]], str]] = {
    "rewards all equal": _flat_rewards,
    "completions cut": _cut,
    "rewards failing": _failing_rewards,
}
_OF_UPDATES: Mapping[str, Callable[[Row, Collection[Row]], str]] = {
    "entropy gone": _entropy,
    "sampler and learner apart": _apart,
}


def _mean(rows: Collection[Row], key: str) -> float:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else 0.0
