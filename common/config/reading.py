"""The configuration from a TOML file and ``section.key=value`` words, and back to text; and what is wrong with it in a
sentence."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from common.config.hints import meant
from common.config.rules import conflicts, second_names, unused_settings
from common.config.schema import FREE, Config, Section
from common.errors import UserError


def load(path: Path | None, overrides: Sequence[str] = (), *, drop_unused: bool = False) -> Config:
    """The configuration of a run: defaults, then the TOML file, then the ``section.key=value`` words.

    ``drop_unused`` leaves out settings of the file that have no effect because of the words.

    Raises ``UserError`` for a file that cannot be read, an unknown key, a wrong value or a setting without effect.
    """
    values = read_toml(path) if path is not None else {}
    for word in overrides:
        _override(values, word)
    if drop_unused:
        list(second_names(values))  # of a run written before
        _drop_unused(values, keep={word.partition("=")[0].strip() for word in overrides})
    return build(values)


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a run file, as they stand there (UTF-8, with or without a byte order mark).

    Raises ``UserError`` for a file that cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"run file {str(path)!r} does not exist; complete runs are in deploy/configs/") from None
    except IsADirectoryError:
        raise UserError(f"run file {str(path)!r} is a folder; give a .toml file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"run file {str(path)!r} cannot be read: {error}; write it as UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets in brackets
        raise UserError(f"run file {str(path)!r} is not valid TOML: {error}; correct that line") from None


def reread(text: str) -> Config:
    """The configuration of ``resolved_toml``'s text, maybe another version's: keys that there are no more, or that have
    no effect any more, are left out, and second names converted. Raises ``UserError`` for anything else that is not
    right now."""
    known = {key for key, _ in fields()}
    written = tomllib.loads(text)
    list(second_names(written))
    values = {
        section: {name: value for name, value in part.items() if f"{section}.{name}" in known}
        for section, part in written.items()
        if section in Config.model_fields
    }
    _drop_unused(values, keep=set())
    return build(values)


def _drop_unused(values: dict[str, Any], keep: set[str]) -> None:
    try:
        unused = unused_settings(Config.model_validate(values))
    except ValidationError:
        return  # ``build`` says what is wrong
    for key in unused.keys() - keep:
        section, name = key.split(".")
        values.get(section, {}).pop(name, None)


def build(values: dict[str, Any]) -> Config:
    """The configuration from nested plain values; checks as ``load``."""
    for sentence in second_names(values):
        raise UserError(sentence)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_sentence(item) for item in error.errors())) from None
    given = {
        f"{section}.{name}": value
        for section, part in config.model_dump(exclude_unset=True).items()
        for name, value in part.items()
    }
    if unused := {key: why for key, why in unused_settings(config).items() if key in given}:
        listed = "; ".join(f"{key}={given[key]!r} has no effect: {why}" for key, why in unused.items())
        raise UserError(f"{listed}. Remove it or change what it depends on")
    for sentence in conflicts(config):
        raise UserError(sentence)
    return config


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with these ``section.key`` set besides what it had set; checks as ``load``."""
    values = config.model_dump(exclude_unset=True)
    for key, value in changes.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    return build(values)


def resolved_toml(config: Config) -> str:
    """Every setting that has an effect in this run, as TOML that ``load`` takes back to an equal configuration."""
    values = config.model_dump()
    for key in unused_settings(config):
        section, name = key.split(".")
        values[section].pop(name, None)
    return tomli_w.dumps(values)


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every ``section.key`` with its pydantic field (default, type, description), in the order of this file."""
    for section, info in Config.model_fields.items():
        assert isinstance(info.default, Section)
        for name, field in type(info.default).model_fields.items():
            yield f"{section}.{name}", field


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of this ``section.key``: it, or its section, is marked ``Free``."""
    section, name = key.split(".")
    whole = Config.model_fields[section]
    return FREE in whole.metadata or FREE in type(whole.default).model_fields[name].metadata


def described(key: str, field: FieldInfo) -> str:
    """What the setting does, its type, and whether it may change when a run is resumed, in one line."""
    may = "; may change on resume" if may_change(key) else ""
    return f"{' '.join((field.description or '').split())} ({type_words(field)}{may})"


def type_words(field: FieldInfo) -> str:
    """The field's type in words a user can act on: ``one of chat, plain``, ``integer``."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    if kind in names:
        return names[kind]
    return {tuple: "list", dict: "table"}.get(get_origin(kind), str(kind))  # type: ignore[arg-type]


def commented_toml() -> str:
    """A TOML file with every key at its default, each under its explanation; keys without effect commented out."""
    default = Config()
    silent = unused_settings(default)
    lines = ["# Every setting of nanogrpo with its default. Lines that start with '# key =' have no effect as the file",
             "# stands; setting them asks for another setting too."]  # fmt: skip
    section = ""
    for key, field in fields():
        head, name = key.split(".")
        if head != section:
            section = head
            lines += ["", f"[{section}]  # {Config.model_fields[section].description}"]
        lines.append(f"# {described(key, field)}")
        value = default.model_dump()[head][name]
        text = " ".join(tomli_w.dumps({name: value}).split()) if not isinstance(value, dict) else f"{name} = {{}}"
        lines.append(f"# {text}" if key in silent else text)
    return "\n".join(lines) + "\n"


def _override(values: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        nearest = meant_by(key.strip()) if equals else ""
        hint = f"; did you mean {nearest}={text.strip()}?" if nearest else ", for example train.steps=10"
        raise UserError(f"{word!r} is not of the form section.key=value{hint}")
    try:  # a TOML value where it is one ("1e-5", "true", "[1, 2]"), plain text otherwise
        value = tomllib.loads(f"v = {text.strip()}")["v"]
    except (ValueError, RecursionError):  # no TOML, or an integer of more digits than Python reads
        value = text.strip()
    target = values
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UserError(f"{word!r}: {part!r} is a value, not a section")
    target[parts[-1]] = value


def _sentence(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        nearest = meant_by(key)
        cure = f"did you mean {nearest!r}?" if nearest else "`nanogrpo config` lists every key"
        return f"unknown key {key!r}; {cure}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    field = dict(fields()).get(".".join(key.split(".")[:2]))
    wanted = f" ({type_words(field)})" if field else ""
    return f"{key}={_shortened(error['input'])}: {message}{wanted}"


def _shortened(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:100]}..."


def meant_by(key: str) -> str:
    """The key or section that somebody who wrote ``key`` most likely meant; empty when it is like none."""
    return meant(key, [name for name, _ in fields()])
