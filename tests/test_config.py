"""The configuration: what it refuses, in which words, and that what it writes it reads back."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import Config, build, commented_toml, fields, inert, load, resolved_toml
from common.errors import UserError

CONFIGS = sorted((Path(__file__).parent.parent / "deploy" / "configs").glob("*.toml"))


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        load(None, words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_runs_are_right(path):
    assert load(path)


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("train.step=3", "train.steps"),
        ("sampler.temprature=1", "sampler.temperature"),
        ("sampler.group_size=2", "train.group_size"),
        ("lerner.loss=grpo", "learner"),
        ("quux.zzz=1", "`nanogrpo config`"),
    ],
)
def test_unknown_key_names_the_nearest(word, nearest):
    assert nearest in refusal(word)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["learner.kl_estimator=k1"], "kl_coef is 0"),
        (["model.lora_alpha=8"], "lora_rank is 0"),
        (["train.group_size=1"], "no spread"),
        (["train.group_size=1", "learner.advantage=leave_one_out"], "mean of the others"),
        (["learner.importance=off", "learner.importance_cap=3"], "importance is off"),
        (["learner.clip_high=0.28"], "inner_updates is 1"),
        (["learner.sapo_tau_positive=2", "learner.inner_updates=2"], "not sapo"),
        (["learner.overlong_tokens=4"], "not penalize"),
        (["optimizer.min_lr_ratio=0.1"], "constant"),
        (["sync.proof=false", "sync.tolerance=1"], "proof is off"),
        (["eval.questions=0", "eval.every=3"], "nothing is evaluated"),
        (["eval.k=[1]"], "pass@k is not measured"),
        (["learner.drop_zero_variance=false", "train.dynamic_sampling_rounds=2"], "no group is replaced"),
    ],
)
def test_setting_without_effect_is_refused_with_the_reason(words, said):
    sentence = refusal(*words)
    assert "has no effect" in sentence
    assert said in sentence


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.steps=0"], "train.steps=0"),
        (["train.steps=x"], "train.steps='x'"),
        (["learner.loss=ppo"], "learner.loss='ppo'"),
        (["optimizer.lr=nan"], "optimizer.lr"),
        (["learner.inner_updates=2", "learner.delta=1.1"], "learner.delta=1.1"),
        (["learner.inner_updates=2", "learner.dual_clip=0.5"], "learner.dual_clip=0.5"),
        (["learner.inner_updates=2", "learner.delta=2", "learner.dual_clip=3"], "both bound"),
        (["learner.loss=cispo"], "learner.clip_high=0.2"),
        (["eval.samples=2", "eval.k=[4]"], "eval.samples=2"),
        (["optimizer.warmup_steps=500"], "optimizer.warmup_steps=500"),
        (["train"], "section.key=value"),
        (["learner.truncated=penalize", "learner.overlong_tokens=999"], "overlong_tokens=999"),
    ],
)
def test_wrong_value_names_key_and_value(words, said):
    assert said in refusal(*words)


@pytest.mark.parametrize(
    ("content", "said"), [(None, "does not exist"), ("[train", "not valid TOML"), ("folder", "is a folder")]
)
def test_run_file_that_cannot_be_read(tmp_path, content, said):
    path = tmp_path / "run.toml"
    if content == "folder":
        path.mkdir()
    elif content:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        load(path)


def test_words_win_over_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[train]\nsteps = 5\ngroup_size = 4\n")
    config = load(path, ["train.steps=7", "task.options.kinds=['sum']", "task.name=my.py:Task"])
    assert (config.train.steps, config.train.group_size) == (7, 4)
    assert config.task.options == {"kinds": ["sum"]}
    assert config.task.name == "my.py:Task"


def test_it_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.steps = 3


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "learner": st.fixed_dictionaries({}, optional={
                "kl_coef": st.sampled_from([0.0, 0.1]), "inner_updates": st.integers(1, 3),
                "loss": st.sampled_from(["grpo", "dapo", "sapo"]), "importance": st.sampled_from(["off", "mask"]),
            }),
            "model": st.fixed_dictionaries({}, optional={"lora_rank": st.integers(0, 8)}),
            "eval": st.fixed_dictionaries({}, optional={"questions": st.integers(0, 9), "samples": st.integers(4, 8)}),
            "sampler": st.fixed_dictionaries({"options": st.dictionaries(st.sampled_from("abc"), st.integers())}),
        },
    )
)  # fmt: skip
def test_resolved_file_reads_back_equal_and_holds_no_inert_key(values):
    try:
        config = build(values)
    except UserError:
        return
    written = tomllib.loads(resolved_toml(config))
    assert build(written) == config
    assert not any(key.split(".")[1] in written[key.split(".")[0]] for key in inert(config))


def test_commented_file_is_the_default_and_explains_every_key(tmp_path):
    path = tmp_path / "all.toml"
    path.write_text(commented_toml())
    assert load(path) == Config()
    for key, field in fields():
        assert field.description, key
        assert f"\n{key.split('.')[1]} = " in commented_toml() or f"\n# {key.split('.')[1]} = " in commented_toml()
