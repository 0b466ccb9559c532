"""The model of a run at any of its checkpoints: written as a Hugging Face folder (``nanogrpo export``), or opened to be
asked (``nanogrpo eval`` and ``sample``), which also take a model folder, a hub id or a GGUF file.

A run that is still going is read as it stands: nothing is locked, and nothing of it is written.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import atomic_files
from common.config import Config, build, load, reread
from common.errors import UserError
from common.weights.handles import FolderWeights
from learner import checkpoint
from learner.checkpoint import Checkpoints
from learner.model import resolve


def export_checkpoint(run: Path, step: int | None, merged: bool, out: Path | None) -> tuple[Path, int]:
    """Writes the model of the run's newest whole checkpoint, or of ``step``'s, to ``out``; returns its folder and its
    step. Raises ``UserError`` where there is no such checkpoint, and for a folder that is not empty."""
    run, step = _run_and_step(run, step)
    check_is_run(run)
    place = Checkpoints(run / "checkpoints", 1).whole(step)
    config = _config_at(run, place)
    if merged and not config.model.lora_rank:
        raise UserError("--merged has no effect on a run that trains every weight; remove it")
    if out is None:
        out = run / "exported" / (place.name + ("-merged" if merged else ""))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{str(out)!r} exists already; name another folder, or remove it")
    with atomic_files.atomic_folder(out) as folder:
        _write(place, config, folder, merged)
    return out, int(place.name.removeprefix("step-"))


def check_is_run(folder: Path) -> None:
    """Raises ``UserError`` for a folder that is not a run's."""
    if not (folder / "config.toml").is_file():
        raise UserError(f"{str(folder)!r} is no run folder (no config.toml in it); name one")


@contextlib.contextmanager
def open_model(name: str, words: Sequence[str], step: int | None = None) -> Iterator[tuple[Config, Path | None, str]]:
    """The configuration for asking a model, the folder of its adapter if it has one, and what to call it.

    ``name`` is a run folder, a checkpoint's, a model folder, a hub id or a GGUF file; ``words`` are
    ``section.key=value``. A run is asked at ``step``, else as it stands: its final model, or where it is not finished
    its newest checkpoint, whose model is written to a temporary folder first.
    """
    for word in words:
        if word.split(".")[0] in ("learner", "optimizer", "sync", "run"):
            raise UserError(f"{word!r} has no effect when a model is only asked; remove it")
    run, step = _run_and_step(Path(name).expanduser(), step)
    if not (run / "config.toml").is_file():
        if step is not None:
            raise UserError(f"--step {step} has no effect on {name!r}, which is no run folder; remove it")
        yield *_model(name, words), name
        return
    config = load(run / "config.toml", words, drop_unused=True)
    checkpoints = Checkpoints(run / "checkpoints", 1)
    steps = checkpoints.steps()
    # A run that was resumed with more steps has a final model of an earlier end.
    finished = (run / "final").is_dir() and (not steps or steps[-1] >= config.train.steps)
    if finished and step is None:
        yield *_at(config, run / "final"), name
        return
    if not steps:
        raise UserError(
            f"run folder {name!r} has no final/ and no checkpoint yet; finish it with `nanogrpo train --resume {name}`"
        )
    place = checkpoints.whole(step)
    with tempfile.TemporaryDirectory(prefix="nanogrpo-asked-") as temporary:
        trained = _config_at(run, place)
        # No sampler serves a DoRA.
        _write(place, trained, Path(temporary), merged=trained.model.lora_variant == "dora")
        yield *_at(config, Path(temporary)), f"{place.name} of {run}"


def _run_and_step(path: Path, step: int | None) -> tuple[Path, int | None]:
    """The run and the step of a path that may be a checkpoint's own."""
    match = re.fullmatch(r"step-(\d+)", path.name)
    if match is None or path.parent.name != "checkpoints" or not (path / "manifest.json").is_file():
        return path, step
    if step not in (None, int(match[1])):
        raise UserError(f"--step {step} is not the step of the checkpoint {str(path)!r}; leave one of them out")
    return path.parent.parent, int(match[1])


def _config_at(run: Path, place: Path) -> Config:
    """As the checkpoint has it; the run folder's where it has none (written by an earlier version)."""
    file = place / "config.toml"
    return reread(file.read_text(encoding="utf-8")) if file.is_file() else load(run / "config.toml", drop_unused=True)


def _write(place: Path, config: Config, folder: Path, merged: bool) -> None:
    base = resolve.prepare(config.model)
    try:
        checkpoint.export(place, config, base, folder, merged)
    except FileNotFoundError:
        raise UserError(f"{str(place)!r} was removed meanwhile, as older checkpoints are; ask again") from None


def _model(name: str, words: Sequence[str]) -> tuple[Config, Path | None]:
    """Of a model, or of an adapter and the base that it names."""
    folder = Path(name).expanduser()
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    base: dict[str, str | None] = {"name": name}
    if adapter is not None:
        described = FolderWeights(str(adapter)).adapter_config or {}
        base = {"name": described.get("base_model_name_or_path", ""), "revision": described.get("revision")}
        if not base["name"]:
            raise UserError(f"{name!r} is an adapter that names no base model; set it in its adapter_config.json")
    # As TOML's text, which JSON's is: it may hold quotes and backslashes.
    named = [f"model.{key}={json.dumps(str(text), ensure_ascii=False)}" for key, text in base.items() if text]
    return load(None, [*named, *words]), adapter


def _at(config: Config, folder: Path) -> tuple[Config, Path | None]:
    """The run's configuration for asking what was written to ``folder``."""
    if (folder / "adapter_config.json").is_file():
        return config, folder
    model = {**config.model.model_dump(exclude_unset=True), "name": str(folder)}
    for key in ("revision", "cache_folder"):  # of the model it came from, and idle for a local folder
        model.pop(key, None)
    return build({**config.model_dump(exclude_unset=True), "model": model}), None
