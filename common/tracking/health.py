"""Signs in a run's own metrics that something is going wrong, with likely causes: for the terminal, log and report.

Everything comes from the rows of ``metrics.jsonl``, so that a report of a killed run finds what the live run found. A
sign must hold for ``LOOKED_AT`` steps in a row, or for the whole of a shorter run. Left out: what stops a run at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from common.types import Group

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
    """The same, a step at a time. What it keeps does not grow with the run."""

    def __init__(self) -> None:
        self.last: deque[Row] = deque(maxlen=LOOKED_AT)
        self.first_update: Row = {}
        self.last_updates: deque[Row] = deque(maxlen=LOOKED_AT)
        self.steps = self.updates = 0
        self.equal_groups, self.had_signal = 0.0, False
        self._found: set[str] = set()

    def add(self, row: Row) -> list[Finding]:
        """What is to be seen from this step on."""
        self.steps += 1
        self.last.append(row)
        equal = row.get("zero_variance_fraction") == 1
        self.equal_groups = self.equal_groups + (row.get("groups_sampled") or 0) if equal else 0.0
        self.had_signal |= not equal
        if row.get("entropy") is not None:
            self.first_update = self.first_update or row
            self.updates += 1
            self.last_updates.append(row)
        return self._look() if self.steps >= LOOKED_AT else []

    def finish(self) -> list[Finding]:
        """What a run shows that ends before it had ``LOOKED_AT`` steps."""
        return self._look() if 0 < self.steps < LOOKED_AT else []

    def _look(self) -> list[Finding]:
        signs = {kind: sign(self) for kind, sign in _SIGNS.items() if kind not in self._found}
        new = [Finding(kind, int(self.last[-1]["step"]), text) for kind, text in signs.items() if text]
        self._found |= {finding.kind for finding in new}
        return new


class HealthTracker:
    """Reports each problem that the run's numbers show once, as soon as they do."""

    def __init__(self, rows: Sequence[Row], say: Callable[[str], None]) -> None:
        """``rows``: the steps that a resumed run has behind it; what they show was reported before."""
        self._rows, self._say, self._watch = list(rows), say, Watch()
        for row in rows:
            self._watch.add(row)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._rows.append({"step": step, **metrics})
        self._report(self._watch.add(self._rows[-1]))

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """Left out: the metrics are enough."""

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """Left out."""

    def finish(self) -> str:
        """The run has ended: reports what a short one showed. Returns why nothing was learned, if nothing was."""
        self._report(self._watch.finish())
        return unlearned(self._rows)

    def close(self) -> None:
        """Nothing is held open."""

    def _report(self, found: Sequence[Finding]) -> None:
        for finding in found:
            self._say(f"step {finding.step}: {finding.text}")


def unlearned(rows: Sequence[Row]) -> str:
    """Why the whole run has changed nothing, or nothing if it has changed something."""
    if rows and all(row.get("loss") is None or row.get("grad_norm") == 0 for row in rows):
        return f"nothing was learned, because no group of its {len(rows)} steps carried a gradient"
    return ""


def _flat_rewards(seen: Watch) -> str:
    if not all(row.get("zero_variance_fraction") == 1 for row in seen.last):
        return ""
    if seen.had_signal and seen.equal_groups < EQUAL_GROUPS:
        return ""
    reward, cut = _mean(seen.last, "reward_mean"), _mean(seen.last, "truncated_fraction")
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


def _cut(seen: Watch) -> str:
    if not all((row.get("truncated_fraction") or 0) >= MANY for row in seen.last):
        return ""
    cut = _mean(seen.last, "truncated_fraction")
    return (
        f"{cut:.0%} of the completions are cut at sampler.max_tokens. Likely: it is too "
        "low for this task; or the model does not end its turns (a base model, or another chat template than it knows: "
        "a string in sampler.stop ends them)"
    )


def _entropy(seen: Watch) -> str:
    first, last = _since_the_first(seen, "entropy")
    if not last or max(last) >= min(FLAT_NATS, first / 10):
        return ""
    return (
        f"the model's entropy fell from {first:.3g} to {last[-1]:.3g} nats a token: it writes one answer and tries "
        "nothing new. Likely: optimizer.lr is too high; or the task is learned. Raise learner.clip_high or "
        "learner.entropy_coef, or stop earlier"
    )


def _apart(seen: Watch) -> str:
    first, last = _since_the_first(seen, "logprob_diff_mean")
    if not last or min(last) <= max(APART_NATS, 2 * first):
        return ""
    return (
        f"sampler and learner differ by {last[-1]:.3g} nats on the sampled tokens, {first:.3g} at first. Likely: "
        "optimizer.lr is too high; train.max_staleness lets the weights run ahead; or sampler.top_p or top_k cuts what "
        "the learner gives weight to"
    )


def _failing_rewards(seen: Watch) -> str:
    lost = sum(row.get("groups_skipped_reward_error") or 0 for row in seen.last)
    asked = lost + sum(row.get("groups_sampled") or 0 for row in seen.last)
    if not asked or lost / asked < FAILED:
        return ""
    return f"{lost:.0f} of {asked:.0f} groups were left out, because a reward failed on them; run.log says how"


_SIGNS: Mapping[str, Callable[[Watch], str]] = {
    "rewards all equal": _flat_rewards,
    "completions cut": _cut,
    "rewards failing": _failing_rewards,
    "entropy near zero": _entropy,
    "sampler and learner differ": _apart,
}


def _since_the_first(seen: Watch, key: str) -> tuple[float, list[float]]:
    """Of the first update, and of the last ones; of these none while there are too few to compare with it."""
    enough = seen.updates > min(LOOKED_AT, seen.steps - 1)
    return seen.first_update.get(key) or 0, [row.get(key) or 0 for row in seen.last_updates] if enough else []


def _mean(rows: Iterable[Row], key: str) -> float:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else 0.0
