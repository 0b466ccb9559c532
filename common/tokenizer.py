"""The tokenizer: how a conversation becomes the tokens that a model sees, and how what it wrote becomes text."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2 import meta

from common.errors import UserError, brief
from common.types import Prompt

_DATE = datetime.date(2024, 7, 26)  # Llama 3's template's own default
# Templates that insert today's date would give a resumed run other prompts.
_DATED: dict[str, Any] = {"date_string": _DATE.strftime("%d %b %Y"), "strftime_now": _DATE.strftime}
# What a chat template reads that is not for task.template_options to set.
_NO_OPTIONS = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}
_NO_OPTIONS |= jinja2.defaults.DEFAULT_NAMESPACE.keys()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or a warning at every forked child


def load_tokenizer(folder: str, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer. Raises ``UserError`` when it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers has no kind of its own for a file that it cannot read
        raise UserError(
            f"model.name: {folder!r} has no tokenizer that transformers can load ({_cause(error)}); "
            "save one into the folder with tokenizer.save_pretrained"
        ) from None


def end_of_sequence_ids(folder: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a completion: the tokenizer's, and those of generation_config.json (else config.json).

    Raises ``UserError`` for a file that is not JSON.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for file in ("generation_config.json", "config.json"):
        path = Path(folder) / file
        try:
            named = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        except (ValueError, AttributeError) as error:
            raise UserError(f"model.name: {str(path)!r} cannot be read ({_cause(error)}); repair it") from None
        if named is not None:
            ids += named if isinstance(named, list) else [named]
            break
    return tuple(dict.fromkeys(ids))


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of tokens that a model wrote. Special tokens are in it: a task's tags may be some of them."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


class Renderer:
    """Gives a task's prompt its ``text`` and ``token_ids``: what the model sees.

    ``chat`` goes through the tokenizer's chat template: a last message by the assistant is continued, after any other
    the assistant's turn is opened. ``plain`` joins the contents with blank lines, without marks that the tokenizer sets
    after a text. ``options`` (``task.template_options``) are variables for the template; ``chat_template`` among them
    names one of several. ``vocabulary``: rows of the model's embedding, 0 where that is not known.

    Raises ``UserError`` for a tokenizer without the template, for options that it does not read, and, when called, for
    a prompt that cannot be shown to the model as the task gave it.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_format: Literal["chat", "plain"] = "chat",
        system_prompt: str = "",
        options: Mapping[str, Any] | None = None,
        vocabulary: int = 0,
    ) -> None:
        self._tokenizer, self._chat, self._vocabulary = tokenizer, prompt_format == "chat", vocabulary
        self._system, self._options = system_prompt, _DATED | dict(options or {})
        self._dropped: dict[tuple[str, ...], int] = {}  # by the roles of a conversation
        self._unopened = ""  # what a template without a generation prompt would leave to the model to write
        self.end_of_turn: int | None = None
        """The token with which the chat template ends the assistant's turn, where it uses one."""
        if self._chat:
            _check_options(tokenizer.chat_template, options or {})
            self._try_out()
        else:
            whole, text = tokenizer("a").input_ids, self._tokens("a")
            ends = range(len(whole), len(text) - 1, -1)
            self._appended = next((len(whole) - end for end in ends if whole[:end][-len(text) :] == text), 0)

    def __call__(self, prompt: Prompt) -> Prompt:
        messages = _messages(prompt)
        if self._system and not any(message["role"] == "system" for message in messages):
            messages.insert(0, {"role": "system", "content": self._system})
        if self._chat:
            text = self._through_template(prompt.id, messages)
            token_ids = self._tokens(text)
        else:
            text = "\n\n".join(message["content"] for message in messages)
            token_ids = self._tokenizer(text).input_ids
            token_ids = token_ids[: len(token_ids) - self._appended]
        if not token_ids:
            raise UserError(
                f"prompt {prompt.id!r} has no tokens as the model would see it (text {text!r}); give its messages "
                "contents, or use another task.prompt_format"
            )
        if self._vocabulary and (largest := max(token_ids)) >= self._vocabulary:
            raise UserError(
                f"prompt {prompt.id!r} holds token {largest} ({self._tokenizer.convert_ids_to_tokens(largest)!r}), but "
                f"the embedding of model.name has {self._vocabulary} rows; resize it to the tokenizer "
                "(model.resize_token_embeddings) and save the model"
            )
        return dataclasses.replace(prompt, text=text, token_ids=tuple(token_ids))

    def _tokens(self, text: str) -> list[int]:
        """Of a text that holds its special tokens already, as a template writes them."""
        token_ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return token_ids

    def _through_template(self, name: str, messages: list[dict[str, str]]) -> str:
        roles = tuple(message["role"] for message in messages)
        continued = roles[-1] == "assistant"
        if (place := self._dropped_of(roles)) >= 0:
            raise UserError(
                f"the model's chat template leaves out message {place + 1} of prompt {name!r} (role {roles[place]}); "
                "use task.prompt_format='plain', a model that knows this role, or a task without it"
            )
        if self._unopened and not continued:
            raise UserError(
                f"the model's chat template has no generation prompt, so that prompt {name!r} would end before "
                f"{self._unopened!r}; add that to the template under {{% if add_generation_prompt %}}, or use "
                "task.prompt_format='plain'"
            )
        try:
            return self._apply(messages, **{"continue_final_message" if continued else "add_generation_prompt": True})
        except Exception as error:  # the template is a program that came with the model
            raise UserError(
                f"the model's chat template refuses prompt {name!r} with roles {', '.join(roles)}: {_cause(error)}; "
                "use task.prompt_format='plain' or another task option"
            ) from None

    def _apply(self, messages: Sequence[Mapping[str, str]], **how: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False, **self._options, **how)
        return text

    def _try_out(self) -> None:
        """Finds out what the template sets around an answer, from one that is known. From a template that refuses this
        one nothing is found out; a prompt that it refuses too is named later."""
        roles = ("system", "user", "assistant")
        system, question, answer = ({"role": role, "content": f"wordsof{role}"} for role in roles)
        for start in ([question], [system, question]):
            try:
                asked, opened = self._apply(start), self._apply(start, add_generation_prompt=True)
                before, found, after = self._apply([*start, answer]).rpartition(answer["content"])
            except Exception:
                continue
            if found:
                if opened == asked and before.startswith(opened):
                    self._unopened = before[len(opened) :].strip()
                special = getattr(self._tokenizer, "added_tokens_decoder", {})
                ends = (i for i in self._tokens(after) if i in special and str(special[i].content).strip())
                self.end_of_turn = next(ends, None)
            return

    def _dropped_of(self, roles: tuple[str, ...]) -> int:
        """Which message of a conversation with these roles the template leaves out; -1 where it shows them all."""
        if roles not in self._dropped:
            words = [f"words{place}of" for place in range(len(roles))]
            try:
                text = self._apply([{"role": role, "content": word} for role, word in zip(roles, words, strict=True)])
            except Exception:  # it wants contents of some form
                text = "".join(words)
            self._dropped[roles] = next((place for place, word in enumerate(words) if word not in text), -1)
        return self._dropped[roles]


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    """The prompt's messages. Raises ``UserError`` where one is not text: a template would insert its Python repr, or
    fail."""
    if not prompt.messages:
        raise UserError(f"prompt {prompt.id!r} has no messages; give it at least one, with role and content")
    for number, message in enumerate(prompt.messages, start=1):
        label = f"message {number} of prompt {prompt.id!r}"
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, Mapping) else None
            if not isinstance(value, str):
                raise UserError(
                    f"{label} has no text as its {key} but {str(value)[:60]!r} ({type(value).__name__}); give one "
                    "string, the text parts joined"
                )
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{label} holds half a character, a lone surrogate, at place {error.start} of its {key}; repair "
                    "the data or leave it out"
                ) from None
    return [dict(message) for message in prompt.messages]


def _check_options(templates: Any, options: Mapping[str, Any]) -> None:
    """Raises ``UserError`` where the tokenizer has no template to use, and for options that it does not read."""
    if not templates:
        raise UserError(
            "task.prompt_format='chat' but the model's tokenizer has no chat template; "
            "use an instruct model or task.prompt_format='plain'"
        )
    template, known = templates, set()
    if not isinstance(templates, str):
        known = {"chat_template"}
        usual = "tool_use" if options.get("tools") and "tool_use" in templates else "default"
        name = options.get("chat_template", usual)
        if not isinstance(name, str) or name not in templates:
            raise UserError(
                f"the model's tokenizer has no chat template {name!r}, only {', '.join(sorted(templates))}; name one "
                "of them in task.template_options.chat_template"
            )
        template = templates[name]
    try:
        # transformers' own tag, which marks what the assistant wrote and writes nothing itself.
        source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except jinja2.TemplateError as error:
        raise UserError(
            f"the model's chat template is not valid Jinja ({_cause(error)}); repair it, or use "
            "task.prompt_format='plain'"
        ) from None
    known |= meta.find_undeclared_variables(tree) - _NO_OPTIONS
    for key in options:
        if key not in known:
            raise UserError(
                f"task.template_options.{key} has no effect: the model's chat template does not read it (it reads "
                f"{', '.join(sorted(known)) or 'none'}); remove it"
            )


def _cause(error: BaseException) -> str:
    """The error in one line: a template's own words, and before another's text its type."""
    text = brief(error)
    return text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"


def check_room(prompts: Sequence[Prompt], max_tokens: int, limit: int) -> None:
    """Raises ``UserError`` for a prompt that leaves no room for ``max_tokens`` within a sampler's ``limit`` tokens."""
    for prompt in prompts:
        if len(prompt.token_ids) + max_tokens > limit:
            raise UserError(
                f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens, which with max_tokens={max_tokens} is more "
                f"than the {limit} this sampler was set up for; shorten the prompt or lower sampler.max_tokens"
            )


@dataclasses.dataclass(frozen=True)
class Room:
    """The longest prompt that a run has room for. Called with a rendered prompt, it says whether that fits; where it
    does not, raises ``UserError`` naming the prompt and the limit, unless ``drop``."""

    max_tokens: int
    context: int
    """Tokens of prompt and completion that the model takes."""
    max_prompt_tokens: int = 0
    """0: no such limit."""
    drop: bool = False
    planned: int = 0
    """The limit that a run with more prompts than it can look at has set itself; 0: none."""

    @property
    def longest(self) -> int:
        limits = (self.max_prompt_tokens, self.planned)
        return min([self.context - self.max_tokens, *(limit for limit in limits if limit)])

    def __call__(self, prompt: Prompt) -> bool:
        length = len(prompt.token_ids)
        if length <= self.longest or self.drop:
            return length <= self.longest
        if self.max_prompt_tokens and length > self.max_prompt_tokens:
            limit = f"more than sampler.max_prompt_tokens={self.max_prompt_tokens}; raise the limit, shorten"
        elif length + self.max_tokens > self.context:
            limit = (
                f"which with sampler.max_tokens={self.max_tokens} is more than the model's context of {self.context}; "
                "lower sampler.max_tokens, shorten"
            )
        else:
            limit = (
                f"more than the {self.planned} that this run has planned for, from those of its prompts that it looked "
                "at; set sampler.max_prompt_tokens to the longest, shorten"
            )
        raise UserError(
            f"prompt {prompt.id!r} has {length} tokens, {limit} the task's prompts, or leave the longer ones out with "
            "task.long_prompts='drop'"
        )

    def planning(self, longest: int) -> Room:
        """The room for prompts of which only some were looked at, the longest of those of ``longest`` tokens: a
        quarter more, in whole steps of 64, unless ``max_prompt_tokens`` says."""
        if self.max_prompt_tokens:
            return self
        return dataclasses.replace(self, planned=-(-longest * 5 // 4 // 64) * 64)
