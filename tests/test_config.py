"""The configuration: what it refuses, in which words, and that what it writes it reads back."""

import tomllib
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import (
    Config,
    LearnerConfig,
    build,
    commented_toml,
    fields,
    load,
    reread,
    resolved_toml,
    unused_settings,
)
from common.config.hints import ELSEWHERE
from common.errors import UserError
from learner.loss import advantages, losses

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
        (["learner.inner_updates=2", "learner.dual_clip=3"], "write learner.delta=3"),
        (["learner.loss=bnpo"], "write learner.loss='dapo'"),
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
    assert not any(key.split(".")[1] in written[key.split(".")[0]] for key in unused_settings(config))


def test_commented_file_is_the_default_and_explains_every_key(tmp_path):
    path = tmp_path / "all.toml"
    path.write_text(commented_toml())
    assert load(path) == Config()
    for key, field in fields():
        assert field.description, key
        assert f"\n{key.split('.')[1]} = " in commented_toml() or f"\n# {key.split('.')[1]} = " in commented_toml()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.seed=20261127120000", "train.seed=20261127120000: input should be less than or equal to 2147483647"),
        ("train.seed=18446744073709551616", "train.seed=18446744073709551616: input should be less"),
        (f"train.seed={'9' * 5000}", "exceeded maximum size"),
        ("optimizer.betas=[1.0, 0.9]", "optimizer.betas.0=1.0: input should be less than 1"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1=1: input should be less than 1"),
        ("task.reward_weights={a=nan}", "task.reward_weights.a=nan: input should be"),
        ("task.reward_weights={a=1e308}", "less than or equal to 1000000"),
        ("task.reward_weights={a=-inf}", "greater than or equal to -1000000"),
        ("task.reward_workers=100000000000000000000000", "less than or equal to 1024"),
        ("timeouts.load_s=1e300", "less than or equal to 100000000"),
        ("task.reward_timeout_s=inf", "less than or equal to 100000000"),
        ("optimizer.lr=nan", "optimizer.lr=nan"),
        ("train.group_size=4294967296", "less than or equal to 2147483647"),
    ],
    ids=lambda value: value[:40],
)
def test_numbers_that_nothing_could_use_are_refused(word, said):
    assert said in refusal(word)


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_boolean_is_no_number(value):
    numbers = 0
    for key, field in fields():
        if field.annotation in (int, float):
            numbers += 1
            assert refusal(f"{key}={value}").startswith(f"{key}={value.title()}: true and false are no numbers")
    assert numbers > 40
    for word in ("optimizer.betas=[0.9, {}]", "eval.k=[{}]", "task.reward_weights={{a={}}}"):
        assert "true and false are no numbers" in refusal(word.format(value))


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("optimizer.learning_rate=1e-5", "optimizer.lr"),
        ("train.learning_rate=1e-5", "optimizer.lr"),
        ("learning_rate=1e-5", "optimizer.lr=1e-5"),
        ("learner.beta=0.1", "learner.kl_coef"),
        ("train.num_generations=8", "train.group_size"),
        ("sampler.max_new_tokens=8", "sampler.max_tokens"),
        ("steps=3", "train.steps=3"),
        ("lr=3", "optimizer.lr=3"),
    ],
)
def test_other_trainers_names_are_known(word, meant):
    assert f"did you mean {meant}" in refusal(word).replace("'", "").replace("?", "")


def test_every_name_of_other_trainers_leads_to_a_setting():
    known = {key for key, _ in fields()}
    for name, key in ELSEWHERE.items():
        assert name == name.lower()
        assert ".".join(key.split(".")[:2]) in known, key
        assert not any(own.split(".")[1] == name for own in known), f"{name} is a setting of ours"


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf[train]\nsteps = 7\n")
    assert load(tmp_path / "run.toml").train.steps == 7


@pytest.mark.parametrize("damage", [b"[train", b"\xff\xfe[train]", b"a = " + b"[" * 5000, b"a = " + b"9" * 5000])
def test_a_damaged_file_is_one_sentence(tmp_path, damage):
    (tmp_path / "run.toml").write_bytes(damage)
    with pytest.raises(UserError, match=r"^run file '.*run.toml' (is not valid TOML|cannot be read)") as caught:
        load(tmp_path / "run.toml")
    assert "\n" not in str(caught.value)


def test_a_run_written_with_second_names_is_read_with_the_first():
    text = resolved_toml(load(None, ["learner.inner_updates=2"])).replace("delta = 0.0", "delta = 0.0\ndual_clip = 3.0")
    assert "dual_clip" in text
    learner = reread(text.replace('loss = "dapo"', 'loss = "bnpo"')).learner
    assert (learner.loss, learner.delta) == ("dapo", 3.0)


def test_every_loss_and_advantage_of_the_configuration_is_in_its_table():
    words = {name: set(get_args(field.annotation)) for name, field in LearnerConfig.model_fields.items()}
    assert words["loss"] == losses.LOSSES.keys()
    assert words["advantage"] == advantages.SCALES.keys()
