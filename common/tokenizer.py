"""The tokenizer, and how a conversation becomes the tokens that the model sees."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from jinja2 import TemplateError

from common.errors import UserError
from common.types import Prompt

_DATE = datetime.date(2024, 7, 26)  # what Llama 3's template says when it is not told
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or a warning at every forked child


def load_tokenizer(folder: str, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer. Raises ``UserError`` when it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.name: {folder!r} has no tokenizer that transformers can load ({str(error).splitlines()[0]}); "
            "save one into the folder with tokenizer.save_pretrained"
        ) from None


def render(
    tokenizer: Any, prompts: Iterable[Prompt], prompt_format: Literal["chat", "plain"] = "chat", system_prompt: str = ""
) -> list[Prompt]:
    """The prompts with ``text`` and ``token_ids``: through the chat template, or their contents joined by blank lines.

    Raises ``UserError`` when the tokenizer has no chat template.
    """
    if prompt_format == "chat" and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "task.prompt_format='chat' but the model's tokenizer has no chat template; "
            "use an instruct model or task.prompt_format='plain'"
        )
    rendered = []
    for prompt in prompts:
        messages = [dict(message) for message in prompt.messages]
        if system_prompt and not any(message["role"] == "system" for message in messages):
            messages.insert(0, {"role": "system", "content": system_prompt})
        if prompt_format == "chat":
            try:
                text = tokenizer.apply_chat_template(
                    messages,
                    add_generation_prompt=True,
                    tokenize=False,
                    # Templates that tell the date would give a resumed run other prompts.
                    date_string=_DATE.strftime("%d %b %Y"),
                    strftime_now=_DATE.strftime,
                )
            except (TemplateError, TypeError) as error:
                roles = ", ".join(message["role"] for message in messages)
                raise UserError(
                    f"the model's chat template refuses prompt {prompt.id!r} with roles {roles}: {error}; "
                    "use task.prompt_format='plain' or another task option"
                ) from None
            # The template writes every special token itself.
            token_ids = tokenizer(text, add_special_tokens=False).input_ids
        else:
            text = "\n\n".join(message["content"] for message in messages)
            token_ids = tokenizer(text).input_ids
        rendered.append(dataclasses.replace(prompt, text=text, token_ids=tuple(token_ids)))
    return rendered


def check_room(prompts: Sequence[Prompt], max_tokens: int, limit: int) -> None:
    """Raises ``UserError`` for a prompt that leaves no room for ``max_tokens`` within a sampler's ``limit`` tokens."""
    for prompt in prompts:
        if len(prompt.token_ids) + max_tokens > limit:
            raise UserError(
                f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens, which with max_tokens={max_tokens} is more "
                f"than the {limit} this sampler was set up for; shorten the prompt or lower sampler.max_tokens"
            )


def check_lengths(prompts: Sequence[Prompt], max_tokens: int, max_prompt_tokens: int, context: int) -> int:
    """The longest prompt's length in tokens, once every prompt is known to fit.

    Raises ``UserError`` naming the first prompt that leaves no room for ``max_tokens`` in the model's context, or is
    longer than ``max_prompt_tokens`` (0: no such limit).
    """
    for prompt in prompts:
        length = len(prompt.token_ids)
        if max_prompt_tokens and length > max_prompt_tokens:
            raise UserError(
                f"prompt {prompt.id!r} has {length} tokens, more than sampler.max_prompt_tokens={max_prompt_tokens}; "
                "raise the limit or shorten the task's prompts"
            )
        if length + max_tokens > context:
            raise UserError(
                f"prompt {prompt.id!r} has {length} tokens, which with sampler.max_tokens={max_tokens} is more than "
                f"the model's context of {context}; lower sampler.max_tokens or shorten the task's prompts"
            )
    return max((len(prompt.token_ids) for prompt in prompts), default=0)
