"""From a task's messages to the tokens that the model sees, from its tokens to text, and whether the trained model's
folder reads every text as its base does. What samplers make of tags and stop strings is in
sampler/conformance/suite.py."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

from common.config import build, resolved_toml
from common.errors import UserError
from common.prompts import LOOKED_AT, looked_at
from common.tokenizer import Renderer, decode, load_tokenizer
from common.types import Prompt
from deploy import components
from deploy.run import folder_of
from learner.distributed import RankGroup
from learner.model import resolve, saving
from learner.torch_learner import TorchLearner
from learner.weight_sync import make_probe
from tests.making import config
from tests.tiny import CHATML, SPECIAL, make_tiny, make_tokenizer


def prompt(*messages: tuple[str, Any]) -> Prompt:
    return Prompt("train-7", tuple({"role": role, "content": content} for role, content in messages))


def tokenizer_with(template: Any) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def refusal(tokenizer: Any, asked: Prompt, *settings: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        Renderer(tokenizer, *settings, **more)(asked)
    assert "\n" not in str(caught.value)
    return str(caught.value)


QUESTION = prompt(("user", "What is 2 + 3?"))

# -- contents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_format", ["chat", "plain"])
@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ((), "has no messages"),
        (({"role": "user", "content": None},), "no text as its content but 'None' (NoneType)"),
        (({"role": "user", "content": [{"type": "text", "text": "hi"}]},), "no text as its content"),
        (({"role": "user", "content": 7},), "'7' (int)"),
        (({"role": "user"},), "no text as its content"),
        (({"role": None, "content": "hi"},), "no text as its role"),
        (({"role": "user", "content": "fine"}, {"role": "user", "content": "a\ud83d"}), "at place 1 of its content"),
        (("user: hi",), "no text as its role"),
    ],
)
def test_contents_that_are_no_text(prompt_format, messages, said):
    sentence = refusal(make_tokenizer(), Prompt("train-7", messages), prompt_format)
    assert "prompt 'train-7'" in sentence and said in sentence


def test_a_lone_surrogate_in_an_id_can_be_printed():
    refusal(make_tokenizer(), Prompt("\ud800", ())).encode()


def test_an_ordinary_conversation_is_what_the_template_makes_of_it():
    tokenizer = make_tokenizer()
    asked = prompt(("system", "Be brief."), ("user", "hi "), ("assistant", "yes"), ("user", "日本 🙂"))
    shown = Renderer(tokenizer)(asked)
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi <|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
        "\n<|im_start|>user\n日本 🙂<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (shown.text, shown.id, shown.messages) == (text, asked.id, asked.messages)
    assert shown.token_ids == tuple(tokenizer(text, add_special_tokens=False).input_ids)
    assert decode(tokenizer, shown.token_ids) == text
    led = Renderer(tokenizer, "chat", "Be brief.")(QUESTION)
    assert led.text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_a_last_message_by_the_assistant_is_continued():
    asked = prompt(("user", "What is 2 + 3?"), ("assistant", "<answer> "))
    for template in (CHATML, CHATML.replace("message['content']", "message['content'].lstrip()")):
        assert Renderer(tokenizer_with(template))(asked).text == (
            "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n<answer> "
        )
    assert Renderer(make_tokenizer(), "plain")(asked).text == "What is 2 + 3?\n\n<answer> "


def test_a_plain_prompt_does_not_end_with_the_mark_that_a_tokenizer_appends():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    bare = tuple(tokenizer("a b", add_special_tokens=False).input_ids)
    pad, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<pad>", "<|im_end|>"))
    for single, right in (
        ("$A", bare),
        ("$A <|im_end|>", bare),
        ("<pad> $A", (pad, *bare)),
        ("<pad> $A <|im_end|> <pad>", (pad, *bare)),
    ):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=[("<pad>", pad), ("<|im_end|>", end)]
        )
        assert Renderer(tokenizer, "plain")(prompt(("user", "a b"))).token_ids == right
    # One that the task wrote itself stays.
    assert Renderer(tokenizer, "plain")(prompt(("user", "a b<|im_end|>"))).token_ids == (pad, *bare, end)


# -- templates ---------------------------------------------------------------------------------------------------------

ROLES = "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}] {{ m['content'] }}\n{% endif %}"
NO_SYSTEM = ROLES + "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
INSTRUCT = (  # opens no turn, and needs none: as Llama 2 and Mistral
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>{% else %}"
    "[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "asked", "said"),
    [
        (CHATML + "{{ 1 // 0 }}", QUESTION, "refuses prompt 'train-7' with roles user: ZeroDivisionError"),
        ("{{ raise_exception('no such role') }}", QUESTION, "refuses prompt 'train-7' with roles user: no such role;"),
        ("{% for %}", QUESTION, "is not valid Jinja"),
        (CHATML.partition("{% if add")[0], QUESTION, r"has no generation prompt, so that prompt 'train-7' would"),
        ("{% if false %}{{ messages }}{% endif %}", QUESTION, "leaves out message 1 of prompt 'train-7' (role user)"),
        (
            NO_SYSTEM,
            prompt(("system", "Use tags."), ("user", "hi")),
            "leaves out message 1 of prompt 'train-7' (role s",
        ),
        ({"rag": CHATML, "tool_use": CHATML}, QUESTION, "no chat template 'default', only rag, tool_use"),
        ("", QUESTION, "has no chat template"),
        (None, QUESTION, "has no chat template"),
    ],
)
def test_templates_that_cannot_show_a_prompt(template, asked, said):
    assert said in refusal(tokenizer_with(template), asked)


def test_a_system_prompt_that_the_template_drops_is_not_dropped_in_silence():
    assert "(role system)" in refusal(tokenizer_with(NO_SYSTEM), QUESTION, "chat", "Be brief.")
    assert Renderer(tokenizer_with(NO_SYSTEM))(QUESTION).text == "[user] What is 2 + 3?\n[assistant] "


def test_a_template_that_opens_no_turn_may_need_none():
    assert Renderer(tokenizer_with(INSTRUCT))(QUESTION).text == "[INST] What is 2 + 3? [/INST]"


def test_a_continued_answer_needs_no_generation_prompt():
    asked = prompt(("user", "hi"), ("assistant", "well"))
    shown = Renderer(tokenizer_with(CHATML.partition("{% if add")[0]))(asked)
    assert shown.text.endswith("<|im_start|>assistant\nwell")


def test_an_empty_prompt_is_named():
    assert "'train-7' has no tokens" in refusal(make_tokenizer(), prompt(("user", "")), "plain")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (INSTRUCT, "<|im_end|>"),
        (CHATML.replace("<|im_end|>\n", "\n<eos><pad>"), "<eos>"),
        (CHATML.replace("<|im_end|>", ""), None),
        (CHATML.replace("{% for", "{% if messages[0].role != 'system' %}{{ 1 // 0 }}{% endif %}{% for"), "<|im_end|>"),
        (CHATML + "{{ 1 // 0 }}", None),
    ],
)
def test_the_token_that_ends_a_turn(template, end):
    tokenizer = tokenizer_with(template)
    found = Renderer(tokenizer).end_of_turn
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == end


THINKS = (
    CHATML
    + "{% generation %}{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{% endgeneration %}"
)


def test_options_of_the_template():
    tokenizer = tokenizer_with(THINKS)
    assert Renderer(tokenizer, options={"enable_thinking": False})(QUESTION).text.endswith("assistant\n<no>")
    for options in ({}, {"enable_thinking": True}):
        assert Renderer(tokenizer, options=options)(QUESTION).text.endswith("assistant\n")
    several = tokenizer_with({"rag": "rag " + CHATML, "other": CHATML})
    assert Renderer(several, options={"chat_template": "rag"})(QUESTION).text.startswith("rag <|im_start|>user")
    for key in ("thinking", "messages", "add_generation_prompt", "tokenize", "chat_template"):
        sentence = refusal(tokenizer, QUESTION, options={key: True})
        assert f"task.template_options.{key} has no effect" in sentence and "enable_thinking" in sentence
    for name in ("default", ["rag"], 3):
        assert "only other, rag" in refusal(several, QUESTION, options={"chat_template": name})


def test_options_are_settings_of_the_run():
    values = {"task": {"template_options": {"enable_thinking": False}}}
    assert build(values).task.template_options == {"enable_thinking": False}
    assert "enable_thinking = false" in resolved_toml(build(values))
    with pytest.raises(UserError, match=r"task\.template_options=.* has no effect: a plain prompt"):
        build({"task": {"prompt_format": "plain", **values["task"]}})


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match=r"sampler\.stop=\['x', ''\] holds an empty string"):
        build({"sampler": {"stop": ["x", ""]}})


# -- what a run is refused for before anything loads -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copied(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def changed_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def prepared(folder: Path, tmp_path: Path, *contents: str, **sections: dict[str, Any]) -> components.Prepared:
    """What ``prepare`` makes of a run with these questions; the folder need not hold real weights."""
    code = (
        "from common.types import Prompt\n"
        "class Mine:\n"
        "    reward_weights = {'short': 1.0}\n"
        "    def __init__(self):\n"
        "        self.rewards = {'short': lambda prompt, completion: 0.0}\n"
        "    def is_correct(self, prompt, completion):\n"
        "        return False\n"
        "    def prompts(self, split):\n"
        f"        asked = [({{'role': 'user', 'content': text}},) for text in {contents!r}]\n"
        "        return [Prompt(f'{split}-{number}', messages) for number, messages in enumerate(asked)]\n"
    )
    file = tmp_path / f"mine{len(list(tmp_path.glob('*.py')))}.py"  # a file is imported once
    file.write_text(code)
    base: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder), "dtype": "float32"},
        "task": {"name": f"{file}:Mine"},
        "sampler": {"name": "hf", "max_tokens": 8},
        "train": {"device": "cpu"},
        "eval": {"questions": 0},
    }
    return components.prepare(build({key: base.get(key, {}) | sections.get(key, {}) for key in base | sections}))


def test_tokens_beyond_the_embedding(copied, tmp_path):
    tokenizer = load_tokenizer(str(copied))
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(copied)
    with pytest.raises(UserError, match=r"'train-1' holds token 385 \('</think>'\), but the embedding .* 384 rows"):
        prepared(copied, tmp_path, "hi", "<think></think>")
    assert len(prepared(copied, tmp_path, "hi", "think").train) == 2, "a token that no prompt holds does no harm"
    changed_json(copied / "generation_config.json", eos_token_id=[3, 400])
    with pytest.raises(UserError, match=r"end token 400 .* not among the 384 rows"):
        prepared(copied, tmp_path, "hi")
    (copied / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json' cannot be read"):
        prepared(copied, tmp_path, "hi")


def test_the_templates_own_end_of_turn_ends_a_completion(copied, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nanogrpo")
    assert prepared(copied, tmp_path, "hi").end_tokens == ()
    assert "ends a turn" not in caplog.text
    changed_json(copied / "tokenizer_config.json", eos_token="<eos>")
    for name in ("config.json", "generation_config.json"):
        changed_json(copied / name, eos_token_id=1)
    ready = prepared(copied, tmp_path, "hi")
    assert ready.end_tokens == components.sampler_setup(ready).end_tokens == (3,)
    assert caplog.text.count("ends a turn with '<|im_end|>', which is no end token of the model") == 1
    assert prepared(copied, tmp_path, "hi", task={"prompt_format": "plain"}).end_tokens == ()


def test_prompts_of_one_token(tiny, tmp_path):
    plain = {"prompt_format": "plain"}
    with pytest.raises(UserError, match=r"of one token each.* sync\.proof=false"):
        prepared(tiny, tmp_path, "a", "b", task=plain)
    assert len(prepared(tiny, tmp_path, "a", "b c d", task=plain).train) == 2
    ready = prepared(tiny, tmp_path, "a", "b", task=plain, sync={"proof": False})
    assert make_probe(ready.train, 16, ready.longest_prompt) == []


def test_template_options_reach_the_prompts(copied, tmp_path):
    tokenizer = tokenizer_with(THINKS)
    tokenizer.save_pretrained(copied)
    ready = prepared(copied, tmp_path, "hi", task={"template_options": {"enable_thinking": False}})
    assert ready.train[0].text.endswith("<no>")
    assert ready.renderer(QUESTION).text.endswith("<no>")


@pytest.mark.parametrize(
    ("values", "right"),
    [
        ({"max_position_embeddings": 77}, 77),
        ({"n_positions": 77}, 77),
        ({"max_seq_len": 77}, 77),
        ({"seq_length": 77}, 77),
        ({"max_position_embeddings": None, "n_ctx": 77}, 77),
        ({"text_config": {"max_position_embeddings": 77}}, 77),
        ({"text_config": None, "max_position_embeddings": 77}, 77),
        ({"max_position_embeddings": "long", "model_type": "gpt2"}, 1024),  # the family's own
        ({"model_type": "llama"}, 2048),
        ({"model_type": "mamba"}, 2**20),
        ({"model_type": "nobody knows"}, 2**20),
        ({}, 2**20),
    ],
)
def test_the_longest_sequence_of_a_model(tmp_path, values, right):
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert resolve.context_tokens(tmp_path) == right
    assert resolve.vocabulary(tmp_path) == 0


def test_the_names_in_a_run_folder(tmp_path):
    def filled(**sections):
        return str(folder_of(build({"run": {"folder": "{model} of {task}"}, **sections})))

    assert filled(model={"name": "meta-llama/Llama-3.2-1B-Instruct"}) == "Llama-3.2-1B-Instruct of warmup"
    assert filled(model={"name": f"{tmp_path}/Qwen2.5-0.5B/"}) == "Qwen2.5-0.5B of warmup"
    assert filled(task={"name": "my/tag.game.py:Game"}) == "SmolLM2-135M-Instruct.Q4_1 of tag.game"
    assert filled(task={"name": "mine.games:Game"}) == "SmolLM2-135M-Instruct.Q4_1 of mine.games"


# -- the trained model's folder ----------------------------------------------------------------------------------------


def _files_of_old(folder: Path) -> None:
    """As GPT-2's and Qwen's were before tokenizer.json: the added tokens are in a file of their own."""
    fast = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in fast["added_tokens"]}
    vocabulary = {token: number for token, number in fast["model"]["vocab"].items() if token not in added}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in fast["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer.json").unlink()
    about = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"additional_special_tokens": list(SPECIAL)}))


def _more_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["<answer>", "</answer>"], special_tokens=True)
    tokenizer.add_tokens(["<think>", "first letter"])
    tokenizer.save_pretrained(folder)


def _several_templates(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = {"default": CHATML, "rag": "rag " + CHATML}
    tokenizer.save_pretrained(folder)
    assert list((folder / "additional_chat_templates").iterdir())


def _by_the_models_type(folder: Path) -> None:
    """Nothing but config.json says of what class the tokenizer is."""
    _files_of_old(folder)
    changed_json(folder / "tokenizer_config.json", tokenizer_class=None)


def _as_it_is(folder: Path) -> None:
    pass


KINDS = [_as_it_is, _files_of_old, _by_the_models_type, _more_tokens, _several_templates]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__.strip("_"))
def pairs(request, tmp_path_factory):
    """The tokenizers of a base, of the model trained from it, and of an adapter."""
    base = make_tiny(tmp_path_factory.mktemp("base") / "model", family="qwen2")
    request.param(base)
    (base / "tokenizer_old").mkdir()  # somebody's copy, which has nothing to do with the model
    (base / "tokenizer_old" / "tokenizer.json").write_text("{}")
    (base / "chat_template_drafts").mkdir()
    found = []
    for rank in (0, 4):
        folder = tmp_path_factory.mktemp("final")
        learner = TorchLearner(config(model={"name": str(base), "dtype": "float32", "lora_rank": rank}), base, "cpu")
        learner.export(folder)
        assert not (folder / "tokenizer_old").exists()
        found.append(load_tokenizer(str(folder)))
    return load_tokenizer(str(base)), found


PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from([*SPECIAL, "<answer>", "</answer>", "<think>", "first letter", " ", "\n\n", "<|im_", "end|>", "7"]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(PIECES, max_size=8))
def test_the_trained_model_reads_every_text_as_its_base(pairs, pieces):
    base, finals = pairs
    text = "".join(pieces)
    for final in finals:
        for special in (False, True):
            ids = base(text, add_special_tokens=special).input_ids
            assert final(text, add_special_tokens=special).input_ids == ids
        assert decode(final, ids) == decode(base, ids)


def test_the_trained_models_tokenizer_is_the_same_in_every_part(pairs):
    base, finals = pairs
    for final in finals:
        assert type(final) is type(base)
        assert final.backend_tokenizer.to_str() == base.backend_tokenizer.to_str()
        assert final.chat_template == base.chat_template
        assert final.special_tokens_map == base.special_tokens_map


SETTINGS = {
    "temperature": {"temperature": 0.9, "top_p": 0.6},
    "top_k": {"top_k": 7},
    "beams": {"early_stopping": True, "length_penalty": 2.0},
    "sampled": {"do_sample": True, "temperature": 0.7, "max_new_tokens": 77},
    "none": {},
}


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("values", SETTINGS.values(), ids=SETTINGS)
def test_generation_settings_are_kept_as_they_are(copied, tmp_path, values, place, rank):
    """Those that transformers reads and then refuses to write, too."""
    if place == "config.json":  # where models of 2022 have them
        (copied / "generation_config.json").unlink()
    changed_json(copied / place, **values)
    spec = config(model={"name": str(copied), "dtype": "float32", "lora_rank": rank})
    folders = [tmp_path / "final"] + [tmp_path / "merged"] * (rank > 0)
    learner = TorchLearner(spec, copied, "cpu")
    for folder in folders:
        folder.mkdir()
        learner.export(folder, merged=folder.name == "merged")
    if place == "generation_config.json":
        assert (folders[0] / place).read_bytes() == (copied / place).read_bytes()
    kept = GenerationConfig.from_pretrained(folders[-1])
    assert {key: getattr(kept, key) for key in values} == values
    assert kept.eos_token_id == learner_end(copied)
    AutoModelForCausalLM.from_pretrained(folders[-1])


def learner_end(folder: Path) -> Any:
    named = [json.loads(file.read_text()).get("eos_token_id") for file in sorted(folder.glob("*config.json"))]
    return [end for end in named if end is not None][-1]


def test_what_belongs_to_the_model_is_copied_and_its_weights_are_not(copied, tmp_path):
    for name in (
        "qwen.tiktoken",
        "bpe.codes",
        "LICENSE",
        "NOTICE.txt",
        "preprocessor_config.json",
        "tokenization_x.py",
    ):
        (copied / name).write_text(name if not name.endswith("json") else "{}")
    left = (
        "pytorch_model.bin",
        "model.onnx",
        "README.md",
        "pytorch_model.bin.index.json",
        ".gitattributes",
        "old.gguf",
    )
    for name in left:
        (copied / name).write_text("{}")
    learner = TorchLearner(config(model={"name": str(copied), "dtype": "float32"}), copied, "cpu")
    (tmp_path / "final").mkdir()
    learner.export(tmp_path / "final")
    there = {file.name for file in (tmp_path / "final").iterdir()}
    assert there == {file.name for file in copied.iterdir()} - set(left)
    assert json.loads((tmp_path / "final" / "config.json").read_text())["model_type"] == "llama"


def test_an_adapters_folder_is_not_taken_for_a_model(tiny, tmp_path):
    """It has the base's config.json, by which its tokenizer is read."""
    learner = TorchLearner(config(model={"name": str(tiny), "dtype": "float32", "lora_rank": 2}), tiny, "cpu")
    learner.export(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (tiny / "config.json").read_bytes()
    with pytest.raises(UserError, match="holds a LoRA adapter only; name its base model"):
        resolve.prepare(config(model={"name": str(tmp_path), "dtype": "float32"}).model)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_folder_that_could_not_be_written_is_found_out_without_writing_it(tiny, rank):
    learner = TorchLearner(config(model={"name": str(tiny), "dtype": "float32", "lora_rank": rank}), tiny, "cpu")
    saving.try_export(learner._model, tiny, RankGroup())
    if rank:
        learner._model.peft_config["default"].lora_alpha = object()  # no JSON
    else:
        learner._model.config.odd = object()
    with pytest.raises(UserError, match=r"a model trained from .* could not be written"):
        saving.try_export(learner._model, tiny, RankGroup())


def test_long_prompts_are_refused_or_dropped(tiny, tmp_path, caplog):
    contents = ["hi", "hi there " * 9, "oh"]
    limit = {"sampler": {"max_prompt_tokens": 30}}
    with pytest.raises(UserError, match=r"'train-1' has \d+ tokens, more than sampler.max_prompt_tokens=30; .*'drop'"):
        prepared(tiny, tmp_path, *contents, **limit)
    drop = limit | {"task": {"long_prompts": "drop"}}
    ready = prepared(tiny, tmp_path, *contents, **drop)
    assert "1 of 3 training prompts are longer than 30 tokens and left out" in caplog.text
    assert ready.longest_prompt == max(len(prompt.token_ids) for prompt in ready.longest) <= 30
    stream = ready.stream()
    assert {prompt.id for prompt in stream.take(8)} == {"train-0", "train-2"}
    assert stream.passed_over == 4
    with pytest.raises(UserError, match="leaves none of the 3 training prompts looked at"):
        prepared(tiny, tmp_path, *contents, **drop | {"sampler": {"max_prompt_tokens": 2}})


def test_of_very_many_prompts_the_room_is_planned(tiny, tmp_path):
    contents = ["hi"] * (LOOKED_AT + 1)
    (unseen,) = {*range(len(contents))} - {*looked_at(len(contents))}
    contents[unseen] = "there " * 40
    ready = prepared(tiny, tmp_path, *contents, train={"prompts_per_step": 2})
    seen = len(ready.train[0].token_ids)
    assert ready.longest_prompt == ready.room.longest == -(-seen * 5 // 4 // 64) * 64
    assert [len(prompt.token_ids) for prompt in ready.longest] == [ready.longest_prompt] * 2, "the rehearsal's"
    with pytest.raises(UserError, match=r"more than the \d+ that this run has planned for.*max_prompt_tokens"):
        ready.stream().take(len(contents))


def test_a_plan_for_very_many_prompts_does_not_choose_the_test_questions(tiny, tmp_path, caplog):
    """A run asks the questions that ``nanogrpo eval`` asks of its model, however short the prompts it looked at are."""
    (tmp_path / "lazy.py").write_text(
        "from common.tasks import Prompts\n"
        "from tests.toy import Toy\n"
        "class Lazy(Toy):\n"
        "    def prompts(self, split):\n"
        "        words = 40 if split == 'test' else 3\n"
        f"        size = {LOOKED_AT + 1} if split == 'train' else 4\n"
        "        toy = Toy(size, words=words).prompts(split)\n"
        "        return Prompts(size, toy.__getitem__)\n"
    )
    task = {"name": f"{tmp_path / 'lazy.py'}:Lazy", "long_prompts": "drop"}
    made = build({
        "model": {"name": str(tiny), "dtype": "float32"}, "task": task, "eval": {"questions": 4},
        "sampler": {"name": "hf", "max_tokens": 8}, "train": {"device": "cpu", "prompts_per_step": 2},
    })  # fmt: skip
    ready, asked = components.prepare(made), components.prepare(made, need_train=False)
    assert ready.test == asked.test
    assert len(ready.test) == 4
    assert ready.room.longest < ready.longest_prompt == max(len(prompt.token_ids) for prompt in ready.test)
    short = made.model_copy(update={"sampler": made.sampler.model_copy(update={"max_prompt_tokens": 60})})
    with pytest.raises(UserError, match=r"leaves none of the 4 test questions; .* 60 tokens; .*eval\.questions=0"):
        components.prepare(short, need_train=False)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("[Prompt(3, (asked,))]", r"gave \"Prompt\(id=3,.* give common.types.Prompt with a text as its id"),
        ("[Prompt('a', (asked,), None)]", "gave .*data by names"),
        ("[Prompt('a', None)]", "prompt 'a' has no messages"),
        ("{'a': Prompt('a', (asked,))}", "raised KeyError"),
        ("Prompts(3, [Prompt('a', (asked,))].__getitem__)", "raised IndexError"),
        ("Prompts(10**12, lambda place: Prompt(str(place), (asked,)))", "1000000000000 training prompts, and an epoch"),
    ],
)
def test_prompts_that_are_none_are_one_sentence(tiny, tmp_path, prompts, said):
    """Whatever is looked at first finds it: before the run, not at the first draw."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from common.tasks import Prompts\nfrom common.types import Prompt\nfrom tests.toy import Toy\n"
        "class Mine(Toy):\n    def prompts(self, split):\n        asked = {'role': 'user', 'content': split}\n"
        f"        return {prompts} if split == 'train' else []\n"
    )
    with pytest.raises(UserError, match=said):
        components.prepare(config(model={"name": str(tiny), "dtype": "float32"}, task={"name": f"{file}:Mine"}))
