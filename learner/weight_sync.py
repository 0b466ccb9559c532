"""Weight transfer from learner to sampler, with proof that the sampler holds the weights. After every sync:

- the bytes: the fingerprint of what was sent equals that of what arrived;
- what is stored: the sampler compares every tensor that it computes with, bit for bit, with the one that arrived
  (``Sampler.check_weights``, where a back end has it);
- what the engine computes: on a fixed probe its log-probs agree with the learner's within a tolerance. An engine may
  take the bytes and use old ones (packed copies, a tied output head, a cached adapter). Each token counts by its
  probability: rounding moves the log-probs of very unlikely tokens by up to a nat;
- movement: once the learner's log-probs have moved, a sampler whose log-probs are bit for bit the old ones is stale.
  This sees a single small step that the tolerance does not.

Before the first step a challenge makes the third check sharp: weights with noise on every tensor are sent, and the
sampler must follow them. The challenge and the first sync are proved on the whole probe; later syncs on its first
``EACH_TIME`` tokens, because a sync's time goes to the probe, and on the whole where those disagree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import get_args

from common.config import SyncConfig
from common.errors import RunFailure
from common.protocols import Learner, Placement, Sampler, Transport
from common.types import Prompt
from common.watchdog import time_limit

EACH_TIME = 32  # probe tokens at each step's sync; half the time goes to reading the weights, so fewer save little
_SETTING = "timeouts.sync_s"
TOLERANCE = {"float32": 0.005, "float16": 0.03, "bfloat16": 0.12}  # nats; where sync.tolerance is 0
# Times the tolerance, in the challenge: under its noise bfloat16's rounding came to 0.06 to 0.14 nats on SmolLM2, one
# stale layer to 0.6 to 0.9, all of them to 2.3 to 3.5.
IN_CHALLENGE = 2
MIN_SHIFT_NATS = 0.002  # nats: a mean change of the learner's log-probs that no engine's arithmetic can swallow whole


class SyncError(RunFailure):
    """The sampler does not hold the learner's weights."""


def make_probe(prompts: Sequence[Prompt], tokens: int, longest: int) -> list[tuple[int, ...]]:
    """Fixed sequences of real text for the proof: the first prompts, ``tokens`` tokens together, each at least 2 and
    at most ``longest`` tokens; empty where no prompt has 2, which ``deploy.components.prepare`` refuses for a proof."""
    probe: list[tuple[int, ...]] = []
    left = tokens
    for prompt in prompts:
        piece = prompt.token_ids[: min(left, longest)]
        if len(piece) >= 2:
            probe.append(tuple(piece))
            left -= len(piece)
        if left < 2:
            break
    return probe


def beginning_of(probe: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
    """The first ``tokens`` tokens of the probe, none left over that has no other before it; the probe if it has no
    more."""
    parts: list[tuple[int, ...]] = []
    for piece in probe:
        left = tokens - sum(map(len, parts))
        if left >= 2:
            parts.append(tuple(piece[:left]))
    return parts


def tolerance_of(config: SyncConfig, dtype: str) -> float:
    """The largest difference that passes for rounding in this number format, nats a token."""
    return config.tolerance or TOLERANCE[dtype]


class WeightSync:
    """Calls in order: ``challenge`` once, then the object itself after every update. ``dtype`` is the model's."""

    def __init__(
        self,
        learner: Learner,
        sampler: Sampler,
        placement: Placement,
        probe: Sequence[Sequence[int]],
        config: SyncConfig,
        timeout_s: float,
        dtype: str = "float32",
    ) -> None:
        self._tolerance = tolerance_of(config, dtype)
        self._learner, self._sampler, self._placement = learner, sampler, placement
        self._probe, self._config, self._timeout_s = list(probe), config, timeout_s
        self._short = beginning_of(probe, EACH_TIME)
        self._first = True  # until the first sync is done
        # By replica and probe: the learner's and its own when it last moved.
        self._last: dict[tuple[str, int], tuple[list[float], list[float]]] = {}

    def challenge(self) -> dict[str, float]:
        """Sends perturbed weights and checks that the sampler follows. The next sync must send the true ones."""
        if not (self._config.proof and self._config.challenge):
            return {}
        # The transfer and the probe have limits of their own; this one is for the noise.
        limit_s = 4 * self._timeout_s
        with time_limit("learner", "putting noise on its weights", limit_s, _SETTING), self._learner.perturbed(seed=7):
            return self._send("the challenge before the first step", IN_CHALLENGE * self._tolerance)

    def __call__(self) -> dict[str, float]:
        """Sends the current weights. Returns seconds_sync, sync_bytes, and of the proof seconds_proof and probe_diff.

        Raises ``SyncError`` when the proof fails.
        """
        metrics = self._send(f"version {self._learner.version}", self._tolerance)
        self._first = False
        return metrics

    def _send(self, what: str, tolerance: float) -> dict[str, float]:
        started = time.perf_counter()
        with self._placement.syncing():
            with time_limit("sampler", f"taking the weights of {what}", self._timeout_s, _SETTING):
                handle = self._learner.publish_weights(merged=not self._sampler.takes_adapters)
                arrived = self._sampler.load_weights(handle, self._learner.version)
            synced_s = time.perf_counter() - started
            sent, sent_bytes = handle.sent()
            metrics = {
                "seconds_sync": synced_s,
                "sync_bytes": float(sent_bytes),
                "sync_transport": float(get_args(Transport).index(handle.transport)),
            }
            if self._config.proof:
                with time_limit("sampler", f"answering the probe for {what}", self._timeout_s, _SETTING):
                    metrics |= self._prove(sent, arrived, what, tolerance)
                metrics["seconds_proof"] = time.perf_counter() - started - synced_s
        return metrics

    def _prove(self, sent: str, arrived: str, what: str, tolerance: float) -> dict[str, float]:
        if sent != arrived:
            raise SyncError(
                f"the sampler did not receive the weights that the learner sent ({what}): fingerprint {arrived} "
                f"arrived, {sent} was sent"
            )
        check = getattr(self._sampler, "check_weights", None)
        if faults := check(sent) if check is not None else []:
            more = f", and {len(faults) - 3} more like these" if len(faults) > 3 else ""
            raise SyncError(
                f"the sampler does not hold what it was sent ({what}): {'; '.join(faults[:3])}{more}. It would compute "
                "with other weights than the learner"
            )
        difference, furthest = 0.0, ""
        if self._short != self._probe:
            difference, furthest = self._differ(self._short, what)
        # A few tokens can differ by chance as much as wrong weights make them; the whole probe decides then.
        # The first sync asks both, so that the next has an old answer to either to compare with.
        beyond = math.isfinite(difference) and difference > tolerance
        if self._first or self._short == self._probe or beyond:
            difference, furthest = self._differ(self._probe, what)
        if not difference <= tolerance:  # also catches nan
            raise SyncError(
                f"the {furthest} computes with other weights than the learner ({what}): their log-probs on the probe "
                f"differ by {difference:.3f} nats a token (counted by its probability), more than {tolerance:g} "
                "(sync.tolerance, twice that in the challenge). The sampler may hold old weights, an old output head "
                "or no adapter"
            )
        return {"probe_diff": difference}

    def _differ(self, probe: Sequence[Sequence[int]], what: str) -> tuple[float, str]:
        """The largest difference from the learner's log-probs, and whose it is. Raises ``SyncError`` when one is the
        old one."""
        mine = _flat(self._learner.logprobs(probe))
        # A pool answers for each of its replicas: every one proves what it holds.
        each = getattr(self._sampler, "logprobs_of_each", None)
        answers = each(probe) if each is not None else {"sampler": self._sampler.logprobs(probe)}
        found = [(self._difference(name, mine, _flat(theirs), what), name) for name, theirs in answers.items()]
        return max(found, key=lambda one: (one[0] != one[0], one[0]))  # nan is the furthest

    def _difference(self, name: str, mine: list[float], theirs: list[float], what: str) -> float:
        assert len(mine) == len(theirs), (len(mine), len(theirs))
        # Which tokens are computed together changes how they are rounded, so that only answers to one and the same
        # probe can be compared bit for bit.
        key = (name, len(mine))
        last = self._last.get(key)
        if last is not None:
            learner_before, sampler_before = last
            moved = _mean_difference(mine, learner_before)
            if theirs == sampler_before and moved > MIN_SHIFT_NATS:
                raise SyncError(
                    f"the {name} still serves old weights ({what}): its log-probs on the probe are bit for bit the "
                    f"old ones, while the learner's moved by {moved:.4f} nats a token"
                )
        if last is None or theirs != last[1]:
            self._last[key] = (mine, theirs)
        return weighted_difference(mine, theirs)


def _flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]


def _mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def weighted_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean |difference| of two rows of log-probs, nats a token, each token weighted by the larger of its two
    probabilities, and by a tenth at the least, so that no few tokens decide. With bfloat16 SmolLM2 is 0.01 to 0.05 off,
    before training and after; a plain mean would be 0.05 to 0.23, mostly from tokens less likely than one in a
    thousand."""
    weights = [max(math.exp(max(a, b)), 0.1) for a, b in zip(one, other, strict=True)]
    return sum(w * abs(a - b) for w, a, b in zip(weights, one, other, strict=True)) / sum(weights)
