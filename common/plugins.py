"""Finds a task, sampler or tracker by name, and makes it with the options of the run file.

A name is an installed entry point (``warmup``), ``module:attr`` or ``path/file.py:attr``. Our own back ends are entry
points like anyone else's, read from ``pyproject.toml`` where only the requirements are installed (a Ray job's working
directory). Whatever goes wrong is a ``UserError`` of one sentence. Every reward worker imports this: no torch here.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import operator
import os
import sys
import sysconfig
import tomllib
import traceback
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from common.errors import UserError

if TYPE_CHECKING:
    from common.config import TaskConfig
    from common.protocols import Task

Kind = Literal["task", "sampler", "tracker"]
_KEYS = {"task": "task.name", "sampler": "sampler.name", "tracker": "run.trackers"}
_GIVEN = {"task": "nothing", "sampler": "a common.types.SamplerSetup", "tracker": "the run folder"}
_METHODS = {
    "sampler": ("generate", "logprobs", "load_weights", "sleep", "wake", "close"),
    "tracker": ("log", "rollouts", "evaluation", "close"),
}


class _NotFoundError(Exception):
    """What is wrong with a name, and the cure, to be read after the setting that has it."""


def find(kind: Kind, name: str) -> Callable[..., Any]:
    """The callable behind a name. Finding the same one twice gives the same object."""
    module, _, attr = name.rpartition(":")
    try:
        if not module or not attr:
            entry = _entry_point(kind, name)
            module, attr = entry.module, entry.attr
        factory = _attribute(_import(module), attr)
        if not callable(factory):
            raise _NotFoundError(
                f"it is a {type(factory).__name__}, no class or function that makes a {kind}; name one"
            )
    except _NotFoundError as error:
        raise UserError(f"{_KEYS[kind]}={name!r}: {error}") from error.__cause__
    return factory  # type: ignore[no-any-return]


def installed(kind: Kind) -> list[tuple[str, str]]:
    """Every installed name with one line about it: the first line of its docstring, or why it cannot be imported."""
    lines = []
    for entry in _entry_points(kind):
        try:
            factory = find(kind, entry.name)
            text = factory.__doc__ or getattr(sys.modules.get(factory.__module__), "__doc__", None) or ""
            lines.append((entry.name, next(iter(text.strip().splitlines()), "")))
        except UserError as error:
            lines.append((entry.name, f"cannot be used: {error}"))
    return lines


def make(kind: Kind, name: str, options: Mapping[str, Any], *args: Any) -> Any:
    """Calls what ``check`` checks with ``args`` and ``options``, and checks that the result is a sampler or tracker.

    Errors from inside the call pass through unchanged.
    """
    made = check(kind, name, options, len(args))(*args, **options)
    _check_methods(kind, name, made, f"makes a {type(made).__name__}")
    return made


def check(kind: Kind, name: str, options: Mapping[str, Any], given: int) -> Callable[..., Any]:
    """The callable behind a name, which must take ``given`` arguments and these options, and be no class of something
    else. Everything that can be found wrong before it is called is a ``UserError``."""
    factory = find(kind, name)
    _check_options(kind, name, factory, options, given)
    if inspect.isclass(factory):
        _check_methods(kind, name, factory, "is a class")
    if hasattr(factory, "check_options"):
        factory.check_options(options)
    return factory


def make_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task, checked to have the shape of ``common.protocols.Task``."""
    try:
        task: Task = make("task", name, options)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"task.name={name!r} cannot be made with task.options={dict(options)}: {one_line(error)}"
        ) from error
    if mistake := _mistake_in(task):
        raise UserError(f"task.name={name!r} {mistake} (see common.protocols.Task)")
    return task


def find_task(config: TaskConfig) -> Task:
    """The task of a run's configuration."""
    return make_task(config.name, config.options)


def version() -> str:
    """The version of nanogrpo, installed or run from its source; empty where neither says."""
    try:
        return distribution("nanogrpo").version
    except PackageNotFoundError:
        return str(_project().get("version", ""))


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


def one_line(error: BaseException) -> str:
    """The exception's type and text in one line."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}" if text else type(error).__name__


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """``did you mean 'NAME'? ``, where one of the names is close; else nothing."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _entry_points(kind: Kind) -> list[EntryPoint]:
    """By name; one that is listed twice (an old egg-info beside a wheel) counts once."""
    group = f"nanogrpo.{kind}s"
    entries = list(entry_points(group=group))
    try:
        distribution("nanogrpo")
    except PackageNotFoundError:
        ours = _project().get("entry-points", {}).get(group, {})
        entries += [EntryPoint(name, value, group) for name, value in ours.items()]
    unique = {(entry.name, entry.value): entry for entry in entries}
    return [unique[key] for key in sorted(unique)]


def _project() -> dict[str, Any]:
    """``[project]`` of our ``pyproject.toml``; empty where only the packages were copied."""
    try:
        text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
        project: dict[str, Any] = tomllib.loads(text)["project"]
        return project if project["name"] == "nanogrpo" else {}
    except (OSError, KeyError, ValueError):
        return {}


def _entry_point(kind: Kind, name: str) -> EntryPoint:
    entries = _entry_points(kind)
    matching = [entry for entry in entries if entry.name == name]
    if len(matching) == 1:
        return matching[0]
    if matching:
        values = " and ".join(entry.value for entry in matching)
        raise _NotFoundError(f"it is offered by {values}; write the one you want as module:NAME")
    if not entries:
        raise _NotFoundError(f"no {kind} is installed; install nanogrpo itself (pip install -e .)")
    names = list(dict.fromkeys(entry.name for entry in entries))
    hint = f"{did_you_mean(name, names)}there are {', '.join(names)}, and your own as path/file.py:NAME or module:NAME"
    raise _NotFoundError(f"it is not installed; {hint}")


def _import(place: str) -> ModuleType:
    """The module of this name, or of this file."""
    path = Path(place).expanduser().resolve()
    is_file = place.endswith(".py")
    if is_file and not path.is_file():
        raise _NotFoundError(f"there is no file {str(path)!r}; give its path from {os.getcwd()!r}")
    # Where users keep their modules, which a console script does not have on its path; and a file's neighbours. Last,
    # so that a user's random.py or learner.py shadows nothing.
    folder = str(path.parent) if is_file else os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return _import_file(path) if is_file else importlib.import_module(place)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing and not is_file and f"{place}.".startswith(f"{missing}."):
            advice = "install it, or name a file as path/file.py:NAME"
            raise _NotFoundError(f"there is no module {place!r}; {advice}") from None
        cure = f"install {missing!r}" if missing else "fix it"
        raise _NotFoundError(f"it does not import ({where(error)}): {one_line(error)}; {cure}") from error


def _import_file(path: Path) -> ModuleType:
    name = f"nanogrpo_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, path
        sys.modules[name] = importlib.util.module_from_spec(spec)  # first: dataclasses look there for their module
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _attribute(module: ModuleType, attr: str) -> Any:
    try:
        return operator.attrgetter(attr)(module)
    except AttributeError:
        public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        classes = ", ".join(name for name, value in public.items() if inspect.isclass(value)) or "none"
        hint = did_you_mean(attr, public) or f"its classes are {classes}"
        raise _NotFoundError(
            f"{attr!r} is not in {getattr(module, '__file__', None) or module.__name__!r}; {hint}"
        ) from None


def _check_methods(kind: Kind, name: str, thing: Any, what: str) -> None:
    lacking = [method for method in _METHODS.get(kind, ()) if not callable(getattr(thing, method, None))]
    if lacking:
        raise UserError(
            f"{_KEYS[kind]}={name!r} {what} that is no {kind}: it has no {', '.join(lacking)} (see common.protocols."
            f"{kind.title()}); name a {kind}"
        )


def _check_options(kind: Kind, name: str, factory: Callable[..., Any], options: Mapping[str, Any], given: int) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some classes written in C have no signature; the call itself will show
        return
    try:
        taken = signature.bind_partial(*range(given)).arguments
    except TypeError:
        raise UserError(
            f"{_KEYS[kind]}={name!r} is called with {_GIVEN[kind]} first, which it does not take; name a class or "
            f"function that makes a {kind}"
        ) from None
    free = [p for p in signature.parameters.values() if p.name not in taken]
    named = {p.name: p for p in free if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for key, value in options.items():
        if key not in named and not any(p.kind is p.VAR_KEYWORD for p in free):
            hint = f"{did_you_mean(key, named)}it takes {', '.join(named) or 'none'}"
            raise UserError(f"{kind}.options.{key}={value!r} is not an option of {kind} {name!r}; {hint}")
    for key, parameter in named.items():
        if parameter.default is parameter.empty and key not in options:
            raise UserError(f"{kind}.options.{key} is missing, and {kind} {name!r} needs it; set it")


def _mistake_in(task: Any) -> str:
    """What a task lacks, with the cure; empty for one that lacks nothing."""
    for part in ("rewards", "reward_weights"):
        if not isinstance(getattr(task, part, None), Mapping):
            return f"has no dictionary {part!r}, which every task needs; give it one"
    for part in ("prompts", "is_correct"):
        if not callable(getattr(task, part, None)):
            return f"has no method {part!r}, which every task needs; give it one"
    if not task.rewards:
        return "has no rewards; give it at least one"
    for reward, function in task.rewards.items():
        if not callable(function):
            return f"has a reward {reward!r} that is not a function; make it (prompt, completion) -> number"
    odd = ", ".join(sorted(set(task.rewards) ^ set(task.reward_weights)))
    return f"has {odd} in only one of rewards and reward_weights; put it in both" if odd else ""
