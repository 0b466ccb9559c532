"""What goes wrong is named at the step where it shows, with likely causes, and a healthy run is left alone."""

import random
import re

import pytest

from common.tracking.health import LOOKED_AT, HealthTracker, Watch, findings, unlearned


def row(step, **changed):
    """A step of a healthy run."""
    draw = random.Random(step)
    values = {
        "step": step, "reward_mean": 0.3 + draw.random() / 10, "zero_variance_fraction": 0.25 + draw.random() / 2,
        "truncated_fraction": draw.random() / 2, "groups_sampled": 8.0, "groups_skipped_reward_error": 0.0,
        "loss": draw.gauss(0, 0.1), "grad_norm": 0.1 + draw.random(), "entropy": 0.5 / step**0.5,
        "logprob_diff_mean": 0.03 + draw.random() / 50,
    }  # fmt: skip
    return {key: value for key, value in (values | changed).items() if value is not None}


NO_UPDATE = dict.fromkeys(("loss", "grad_norm", "entropy", "logprob_diff_mean"))
SIGNS = [
    ("rewards all equal", {"zero_variance_fraction": 1.0, "reward_mean": 0.0, **NO_UPDATE}, "mean reward 0"),
    ("rewards all equal", {"zero_variance_fraction": 1.0, "truncated_fraction": 0.8}, "cut .*80% at sampler.max_tok"),
    ("completions cut", {"truncated_fraction": 0.95}, r"95% of the completions are cut at sampler\.max_tokens"),
    ("entropy near zero", {"entropy": 0.004}, "entropy fell from 0.5 to 0.004"),
    ("sampler and learner differ", {"logprob_diff_mean": 0.4}, r"differ by 0\.4 nats .* optimizer\.lr"),
    ("rewards failing", {"groups_skipped_reward_error": 2.0, "groups_sampled": 6.0}, "6 of 24 groups"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "sick", "said"), SIGNS)
@pytest.mark.parametrize("begin", [1, 12])
def test_a_sign_is_named_once_and_where_it_has_lasted(kind, sick, said, begin):
    if begin == 1 and kind in ("entropy near zero", "sampler and learner differ"):
        begin = 2  # there must be something to compare with
    rows = [row(step, **(sick if step >= begin else {})) for step in range(1, 40)]
    (found,) = findings(rows)
    lasts = LOOKED_AT
    if begin > 1 and kind == "rewards all equal":
        lasts = 16  # of 8 groups, once some have had signal
    assert (found.kind, found.step) == (kind, begin + lasts - 1)
    assert re.search(said, found.text), found.text
    assert "\n" not in found.text


def test_a_healthy_run_is_left_alone():
    assert findings([row(step) for step in range(1, 500)], finished=True) == []
    assert findings([], finished=True) == []
    # Short spells, and a task that is learned: most groups agree, entropy falls with the reward's rise.
    spells = [row(step, **({"zero_variance_fraction": 1.0, "truncated_fraction": 1.0} if step % 3 else {}))
              for step in range(1, 60)]  # fmt: skip
    assert findings(spells) == []
    assert findings([row(step, entropy=0.4 / step) for step in range(1, 15)]) == []
    # A model that was sharp from the start, and one whose numbers always differed as much.
    assert findings([row(step, entropy=0.01, logprob_diff_mean=0.2) for step in range(1, 60)]) == []


@pytest.mark.parametrize("size", [4, 8, 24])
def test_a_run_that_learns_well_is_left_alone_late_too(size):
    """The demo's course: reward from 0.4 to 0.9, and 75 to 88 % of the groups agree from a third of the run on, so that
    with 8 prompts a step every third step has no group with signal."""
    for seed in range(20):
        draw, rows = random.Random(seed), []
        for step in range(1, 101):
            agree = min(0.2 + 0.02 * step, 0.88)
            flat = sum(draw.random() < agree for _ in range(size)) / size
            rows.append(row(
                step, reward_mean=min(0.4 + 0.01 * step, 0.9), zero_variance_fraction=flat, groups_sampled=float(size),
                truncated_fraction=max(0.0, 0.27 - 0.05 * step),
                **(NO_UPDATE if flat == 1 else {"entropy": max(1.7 * 0.9**step, 0.15), "logprob_diff_mean": 0.03}),
            ))  # fmt: skip
        assert findings(rows, finished=True) == []


@pytest.mark.parametrize("steps", [1, 2])
def test_a_short_run_is_judged_by_what_it_has(steps):
    rows = [row(step, zero_variance_fraction=1.0, **NO_UPDATE) for step in range(1, steps + 1)]
    assert findings(rows) == []
    (found,) = findings(rows, finished=True)
    assert (found.kind, found.step) == ("rewards all equal", steps)


def test_why_nothing_was_learned():
    flat = [row(step, zero_variance_fraction=1.0, **NO_UPDATE) for step in (1, 2)]
    assert unlearned(flat) == "nothing was learned, because no group of its 2 steps carried a gradient"
    assert unlearned([row(1, grad_norm=0.0, loss=0.0)])  # learner.drop_zero_variance=false
    assert unlearned([*flat, row(3)]) == ""
    assert unlearned([]) == ""


def test_the_run_hears_of_it_at_that_step_and_not_again_when_resumed():
    heard = []
    rows = [row(step, truncated_fraction=1.0) for step in range(1, 6)]
    tracker = HealthTracker([], heard.append)
    for step in rows:
        tracker.log(step["step"], {key: value for key, value in step.items() if key != "step"})
    assert tracker.finish() == ""
    (text,) = heard
    assert text.startswith("step 3: 100% of the completions are cut")
    resumed = HealthTracker(rows, heard.append)
    resumed.log(6, row(6, truncated_fraction=1.0))
    assert len(heard) == 1


def test_a_long_run_costs_no_more_a_step():
    """A step looks at the last few alone: what is kept does not grow."""
    watch = Watch()
    for step in range(1, 5000):
        watch.add(row(step, truncated_fraction=1.0))
    assert len(watch.last) == len(watch.last_updates) == LOOKED_AT
