"""Finds a task, sampler or tracker by name, and makes it with the options of the run file.

A name is one of three things: an installed entry point (``warmup``), ``module:attr`` (``my_package.tasks:MyTask``) or
``path/file.py:attr`` (``my_task.py:MyTask``). Whatever goes wrong on the way is a ``UserError`` of one sentence.

Left out: any list of our own back ends. They are entry points of this distribution like anyone else's; where it is not
installed (a Ray job's working directory on a node that has only the requirements) they are read from the
``pyproject.toml`` beside this package. Used by the composition root and, for tasks, by every reward worker
(``common/rewards/scorer.py``), which is why nothing here may import torch.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import tomllib
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from common.errors import UserError

if TYPE_CHECKING:
    from common.config import TaskConfig
    from common.protocols import Task

Kind = Literal["task", "sampler", "tracker"]
_GIVEN = {"task": "nothing", "sampler": "a common.types.SamplerSetup", "tracker": "the run folder"}
_METHODS = {
    "sampler": ("generate", "logprobs", "load_weights", "sleep", "wake", "close"),
    "tracker": ("log", "rollouts", "evaluation", "close"),
}


def find(kind: Kind, name: str) -> Callable[..., Any]:
    """The callable behind a name. Finding the same one twice gives the same object."""
    assert kind in get_args(Kind), kind
    place, colon, attr = name.rpartition(":")
    if not colon:
        if name.endswith(".py"):
            raise UserError(f"{_key(kind)}={name!r} does not say what to take from the file; write {name}:NAME")
        return _from_entry_point(kind, name)
    if not place or not attr:
        raise UserError(f"{_key(kind)}={name!r} is neither module:NAME nor path/file.py:NAME")
    module = _file(kind, name, place) if place.endswith(".py") else _module(kind, name, place)
    return _attribute(kind, name, module, attr)


def installed(kind: Kind) -> list[tuple[str, str]]:
    """Every installed name with one line about it: the first line of its docstring, or why it cannot be imported."""
    lines = []
    for entry in _entries(kind):
        try:
            found = _from_entry_point(kind, entry.name)
        except UserError as error:
            lines.append((entry.name, f"cannot be used: {error}"))
            continue
        text = found.__doc__ or getattr(sys.modules.get(found.__module__), "__doc__", None) or ""
        lines.append((entry.name, next((line.strip() for line in text.splitlines() if line.strip()), "")))
    return lines


def make(kind: Kind, name: str, options: Mapping[str, Any], *args: Any) -> Any:
    """Calls what ``check`` checks with ``args`` and ``options``, and sees that a sampler or tracker came of it.

    Errors from inside the call pass through unchanged.
    """
    made = check(kind, name, options, len(args))(*args, **options)
    _check_methods(kind, name, made, f"makes a {type(made).__name__}")
    return made


def check(kind: Kind, name: str, options: Mapping[str, Any], given: int) -> Callable[..., Any]:
    """The callable behind a name, which must take ``given`` arguments and these options, and be no class of something
    else. Everything that can be found wrong before it is called is a ``UserError``."""
    found = find(kind, name)
    _check_options(kind, name, found, options, given)
    if inspect.isclass(found):
        _check_methods(kind, name, found, "is a class")
    if hasattr(found, "check_options"):
        found.check_options(options)
    return found


def _check_methods(kind: Kind, name: str, thing: Any, what: str) -> None:
    lacking = [method for method in _METHODS.get(kind, ()) if not callable(getattr(thing, method, None))]
    if lacking:
        raise UserError(
            f"{_key(kind)}={name!r} {what} that is no {kind}: it has no {', '.join(lacking)} (see common.protocols."
            f"{kind.title()}); name a {kind}"
        )


def make_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task, checked to have the shape of ``common.protocols.Task``."""
    try:
        task: Task = make("task", name, options)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"task.name={name!r} cannot be made with task.options={dict(options)}: {_brief(error)}"
        ) from error
    _check_task(name, task)
    return task


def version() -> str:
    """The version of nanogrpo, installed or run from its source; empty where neither says."""
    try:
        return distribution("nanogrpo").version
    except PackageNotFoundError:
        return str(_own_project().get("version", ""))


def find_task(config: TaskConfig) -> Task:
    """The task of a run's configuration."""
    return make_task(config.name, config.options)


def _entries(kind: Kind) -> list[EntryPoint]:
    """Installed entry points by name; one that is listed twice (an old egg-info beside a wheel) counts once."""
    group = f"nanogrpo.{kind}s"
    unique = {(entry.name, entry.value): entry for entry in (*entry_points(group=group), *_declared(group))}
    return [unique[key] for key in sorted(unique)]


def _declared(group: str) -> list[EntryPoint]:
    """Our own entry points out of ``pyproject.toml``, where nanogrpo runs from its source without being installed."""
    try:
        distribution("nanogrpo")
        return []
    except PackageNotFoundError:
        pass
    declared = _own_project().get("entry-points", {}).get(group, {})
    return [EntryPoint(name, value, group) for name, value in declared.items()]


def _own_project() -> dict[str, Any]:
    """``[project]`` of our ``pyproject.toml``; empty where only the packages were copied."""
    file = Path(__file__).parent.parent / "pyproject.toml"
    try:
        project = dict(tomllib.loads(file.read_text(encoding="utf-8"))["project"])
    except (OSError, KeyError, ValueError):
        return {}
    return project if project.get("name") == "nanogrpo" else {}


def _key(kind: Kind) -> str:
    """The setting that names it."""
    return "run.trackers" if kind == "tracker" else f"{kind}.name"


def _from_entry_point(kind: Kind, name: str) -> Callable[..., Any]:
    entries = _entries(kind)
    matching = [entry for entry in entries if entry.name == name]
    if not matching:
        names = list(dict.fromkeys(entry.name for entry in entries))
        if not names:
            raise UserError(
                f"{_key(kind)}={name!r}: no {kind} is installed; install nanogrpo itself (pip install -e .)"
            )
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"{_key(kind)}={name!r} is not installed; {hint}There are {', '.join(names)}, "
            "and your own as path/file.py:NAME or module:NAME"
        )
    if len(matching) > 1:
        places = " and ".join(entry.value for entry in matching)
        raise UserError(f"{_key(kind)}={name!r} is offered by {places}; write the one you want as module:NAME")
    entry = matching[0]
    return _attribute(kind, name, _module(kind, name, entry.module), entry.attr)


def _module(kind: Kind, name: str, module: str) -> Any:
    # A console script does not have the current folder on its path, where users keep their modules.
    _add_to_path(os.getcwd())
    try:
        return importlib.import_module(module)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise UserError(
                f"{_key(kind)}={name!r}: there is no module {module!r}; install it, or name a file as path/file.py:NAME"
            ) from None
        needed = error.name or str(error)
        raise UserError(
            f"{_key(kind)}={name!r} needs the Python module {needed!r}, which is not installed; install it"
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{_key(kind)}={name!r} does not import ({where(error)}): {_brief(error)}; fix it") from error


def _file(kind: Kind, name: str, place: str) -> Any:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{_key(kind)}={name!r}: there is no file {str(path)!r}; give its path from {os.getcwd()!r}")
    # Its neighbours are importable too. Last on the path, so that a user's random.py or learner.py shadows nothing.
    _add_to_path(str(path.parent))
    module_name = f"nanogrpo_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before it runs: dataclasses and pickle look there for its classes
    try:
        spec.loader.exec_module(module)
    except UserError:
        del sys.modules[module_name]
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise UserError(f"{_key(kind)}={name!r} does not import ({where(error)}): {_brief(error)}; fix it") from error
    return module


def _attribute(kind: Kind, name: str, module: Any, attr: str) -> Callable[..., Any]:
    found = module
    for part in attr.split("."):
        if not hasattr(found, part):
            own = [key for key, value in vars(module).items() if inspect.isclass(value) and not key.startswith("_")]
            close = difflib.get_close_matches(attr, [key for key in vars(module) if not key.startswith("_")], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"its classes are {', '.join(own) or 'none'}"
            raise UserError(f"{_key(kind)}={name!r}: {attr!r} is not in {_place(module)}; {hint}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(
            f"{_key(kind)}={name!r} is a {type(found).__name__}, not a class or function that makes a {kind}; name one"
        )
    return found  # type: ignore[no-any-return]


def _check_options(kind: Kind, name: str, found: Callable[..., Any], options: Mapping[str, Any], given: int) -> None:
    try:
        parameters = list(inspect.signature(found).parameters.values())
    except (TypeError, ValueError):  # some classes written in C have no signature; the call itself will tell
        return
    if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        first = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(first) < given:
            raise UserError(
                f"{_key(kind)}={name!r} is called with {_GIVEN[kind]} first, which it does not take; name a class or "
                f"function that makes a {kind}"
            )
        parameters = [p for p in parameters if p not in first[:given]]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key, value in options.items():
            if key not in named:
                close = difflib.get_close_matches(key, named, n=1)
                hint = f"did you mean {close[0]!r}? It" if close else "it"
                takes = f"takes {', '.join(named)}" if named else "takes no options"
                raise UserError(f"{kind}.options.{key}={value!r} is not an option of {kind} {name!r}; {hint} {takes}")
    missing = [key for key, p in named.items() if p.default is p.empty and key not in options]
    if missing:
        raise UserError(f"{kind}.options.{missing[0]} is missing, and {kind} {name!r} needs it; set it")


def _check_task(name: str, task: Any) -> None:
    for part in ("rewards", "reward_weights", "prompts", "is_correct"):
        if not hasattr(task, part):
            raise UserError(f"task.name={name!r} has no {part!r}, which every task needs (see common.protocols.Task)")
    for part in ("prompts", "is_correct"):
        if not callable(getattr(task, part)):
            raise UserError(f"task.name={name!r}: {part!r} is not a method; make it one (see common.protocols.Task)")
    for part in ("rewards", "reward_weights"):
        if not isinstance(getattr(task, part), Mapping):
            raise UserError(
                f"task.name={name!r}: {part!r} is not a dictionary; make it one (see common.protocols.Task)"
            )
    if not task.rewards:
        raise UserError(f"task.name={name!r} has no rewards; give it at least one")
    for reward, function in task.rewards.items():
        if not callable(function):
            raise UserError(
                f"task.name={name!r}: reward {reward!r} is not a function; make it (prompt, completion) -> number"
            )
    if set(task.rewards) != set(task.reward_weights):
        odd = ", ".join(sorted(set(task.rewards) ^ set(task.reward_weights)))
        raise UserError(f"task.name={name!r}: {odd} is in only one of rewards and reward_weights; put it in both")


def _add_to_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)


def _place(module: Any) -> str:
    return repr(getattr(module, "__file__", None) or module.__name__)


def where(error: BaseException, *ours: str) -> str:
    """``file, line N`` of the deepest statement that is the user's own: not Python's, not a package's, not in a file of
    ``ours`` or this one."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    ours = (__file__, *ours)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours and f.filename[:1] != "<"]
    libraries = tuple(sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib"))
    own = [frame for frame in frames if not frame.filename.startswith(libraries)] or frames
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else "before its first line"


def _brief(error: BaseException) -> str:
    """The exception in one line."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}" if text else type(error).__name__
