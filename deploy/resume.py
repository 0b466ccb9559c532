"""Resuming a run: the configuration that it may have, and what must be unchanged for it to be the same run.

The run's former configuration is read from its newest checkpoint, not from the folder's own ``config.toml``, which
people edit. Used by ``deploy/cli.py`` before anything is loaded, and by ``deploy/run.py``, which writes what is read
here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import atomic_files, plugins
from common.config import Config, changed, fields, load, may_change, reread, resolved_toml
from common.errors import UserError
from common.prompts import PromptStream
from common.weights.handles import weight_files
from learner.checkpoint import Checkpoints

log = logging.getLogger("nanogrpo")
_CONFIG, _CONTENTS = "config.toml", "contents.json"
_FILES = ("task.name", "sampler.name")
"""The settings that may name a Python file of the user's whose code decides what is learned."""


def kept(config: Config) -> dict[str, str]:
    """The files of a checkpoint that a run is known by again."""
    return {_CONFIG: resolved_toml(config), _CONTENTS: atomic_files.to_json(_contents(config), indent=2) + "\n"}


def config_of(folder: Path, words: Sequence[str]) -> Config:
    """The configuration that a run folder was made with, changed by ``words``; checks as ``same_run``."""
    if not (folder / _CONFIG).is_file():
        raise UserError(f"--resume {str(folder)!r}: there is no run (no config.toml in it); name a run folder")
    if any(word.partition("=")[0].strip() == "run.folder" for word in words):
        raise UserError(f"run.folder has no effect with --resume, which names the folder {str(folder)!r}; remove it")
    return same_run(folder, load(folder / _CONFIG, words, drop_unused=True))


def same_run(folder: Path, config: Config) -> Config:
    """The configuration for going on with the run in ``folder``, its files by full paths.

    Raises ``UserError`` for a setting that would make it another run, and when the run's checkpoints are gone.
    """
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    text = checkpoints.text(_CONFIG)
    # A run ended before its first checkpoint, or whose checkpoints are of a version that kept no configuration there.
    before = anchored(reread(text) if text is not None else load(folder / _CONFIG, drop_unused=True))
    if not checkpoints.steps():
        _check_none_is_lost(folder, before)
    config = anchored(config)
    if config.model.dtype == "auto":  # it keeps its number format
        config = changed(config, {"model.dtype": before.model.dtype})
    moved = _moved(config, before, json.loads(checkpoints.text(_CONTENTS) or "{}"))
    for key, _ in fields():
        old, new = _compared(before, key), _compared(config, key)
        chooses = key == "sampler.max_prompt_tokens" and before.task.long_prompts == "drop"  # prompts, by their length
        if old == new or (may_change(key) and not chooses) or key in moved:
            continue
        if (key, old, new) == ("task.long_prompts", "refuse", "drop"):  # none was too long until now
            continue
        if key == "train.steps" and config.optimizer.schedule == "constant":
            continue
        why = "when a run is resumed, or it would not be the same run; `nanogrpo config` marks what can"
        if key == "train.steps":
            why = (
                f"under optimizer.schedule={config.optimizer.schedule!r}, whose rates it would change; leave it, or "
                "start another run (a constant schedule can be extended)"
            )
        raise UserError(f"{key}={new!r} cannot change from {old!r} {why}")
    done = max(checkpoints.steps(), default=0)
    if done > config.train.steps:
        raise UserError(
            f"train.steps={config.train.steps} is less than the {done} steps this run has done; give more, or start "
            "another run"
        )
    return config


def check_task(folder: Path, config: Config, stream: PromptStream) -> None:
    """Raises ``UserError`` when the training prompts are not those of the run's last checkpoint; says where the user's
    own code has changed, which may be just why the run is resumed, or the model's files."""
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    state = checkpoints.text("state.json")
    if state is not None:
        stream.check(json.loads(state)["stream"])
    before = json.loads(checkpoints.text(_CONTENTS) or "{}")
    for key, sha256 in _contents(config).items():
        if before.get(key, sha256) != sha256:
            what = f"{key}={_get(config, key)!r}"
            log.warning("%s has changed since the last checkpoint; the run goes on with it as it is now", what)


def anchored(config: Config) -> Config:
    """The configuration with the files that it names by full paths, so that the run can be resumed from any folder.

    Not in a submitted job, which works in a temporary copy of its folder: each node finds its own by relative names.
    """
    if "_ray_pkg_" in str(Path.cwd()):
        return config
    changes: dict[str, Any] = {key: _full_name(str(_get(config, key))) for key in _FILES}
    changes["run.trackers"] = tuple(_full_name(name) for name in config.run.trackers)
    name = config.model.name
    if not name.startswith("package:") and Path(name).expanduser().exists():
        changes["model.name"] = _full(name)
    for key in ("task.options", "sampler.options"):
        options = _get(config, key).items()
        changes[key] = {option: _full(value) if _is_path(value) else value for option, value in options}
    changes = {key: value for key, value in changes.items() if value != _get(config, key)}
    return changed(config, changes) if changes else config


def _full(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _full_name(name: str) -> str:
    """``my_task.py:MyTask`` with the file's full path; any other name as it is."""
    place, colon, attribute = name.rpartition(":")
    return f"{_full(place)}{colon}{attribute}" if place.endswith(".py") else name


def _is_path(value: Any) -> bool:
    """Whether an option's value reads as a path (by a separator or a suffix) and is one here."""
    reads_so = isinstance(value, str) and (os.sep in value or Path(value).suffix)
    return bool(reads_so) and Path(value).expanduser().exists()


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _compared(config: Config, key: str) -> Any:
    """The setting's value, without what the back end says only moves memory or time."""
    value = _get(config, key)
    if key == "sampler.options":
        free: frozenset[str] = getattr(plugins.find("sampler", config.sampler.name), "free_options", frozenset())
        return {name: option for name, option in value.items() if name not in free}
    return value


def _contents(config: Config) -> dict[str, str]:
    """SHA-256 of the user's own code behind these settings, and of a local model's files: of their sizes and first
    bytes, because hashing all of them would take minutes."""
    found = {}
    for key in _FILES:
        place = Path(_get(config, key).rpartition(":")[0])
        if place.suffix == ".py" and place.is_file():
            found[key] = hashlib.sha256(place.read_bytes()).hexdigest()
    model = Path(config.model.name)
    parts = weight_files(model) if (model / "config.json").is_file() else [model] if model.suffix == ".gguf" else []
    if parts and all(part.is_file() for part in parts):
        digest = hashlib.sha256()
        for part in parts:
            with part.open("rb") as opened:
                digest.update(f"{part.stat().st_size} ".encode() + opened.read(1 << 20))
        found["model.name"] = digest.hexdigest()
    return found


def _moved(config: Config, before: Config, contents: Mapping[str, str]) -> set[str]:
    """The settings that name the same contents by another path."""

    same = {key for key, sha256 in _contents(config).items() if contents.get(key) == sha256}
    attribute = {key: [str(_get(of, key)).rpartition(":")[2] for of in (config, before)] for key in _FILES}
    return {key for key in same if key not in _FILES or len({*attribute[key]}) == 1}


def _check_none_is_lost(folder: Path, before: Config) -> None:
    """Raises ``UserError`` for a run without a checkpoint that must have had one."""
    done = max((row.get("step", 0) for row in atomic_files.read_json_lines(folder / "metrics.jsonl")), default=0)
    every = before.run.save_every
    if (folder / "final").is_dir() or (every and done > every):
        cure = f"its model is in {str(folder / 'final')!r}" if (folder / "final").is_dir() else "put them back"
        raise UserError(
            f"the run in {str(folder)!r} has done {done} steps, but none of its checkpoints is left in "
            f"{str(folder / 'checkpoints')!r}, so it cannot go on; {cure}, or start another run in another folder"
        )
