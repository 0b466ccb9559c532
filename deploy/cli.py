"""The ``nanogrpo`` command. Exit codes: 0 done, 1 something failed, 2 the user's mistake, 130 stopped and saved.

Commands import what needs torch when they are called: ``--help`` and most mistakes answer without it.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Group as Stack
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from common import atomic_files, plugins
from common.config import Config, commented_toml, described, fields, load, meant_by
from common.errors import RunFailure, UserError, is_out_of_memory, printable
from common.tracking.console import terminal

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune language models with Group Relative Policy Optimization.",
)
out = terminal()
err = terminal(stderr=True)

_LESS_MEMORY = (
    "lower learner.microbatch_tokens or sampler.options.gpu_memory_utilization, set learner.gradient_checkpointing, "
    "or train an adapter (model.lora_rank=8)"
)
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}
"""The libraries' progress bars and advice would tear the display; what the user has set stays."""
Words = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="settings that win")]
Model = Annotated[str, typer.Argument(metavar="MODEL_OR_RUN_DIR", help="run folder, model folder, hub id or .gguf")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="a run folder: finished, stopped, killed or running")]
Step = Annotated[int | None, typer.Option("--step", min=0, help="of a run folder: the checkpoint of this step")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]


@contextmanager
def _in_sentences() -> Iterator[None]:
    """A user's mistake and a failure end in one sentence; anything else is our mistake and keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):  # what the terminal's encoding lacks is written as \u2192, and no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    log = logging.getLogger("nanogrpo")
    log.setLevel(logging.INFO)
    handler = RichHandler(console=err, show_path=False, show_time=False, level=logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    except UserError as error:
        raise _exit(2, f"error: {error}") from None
    except RunFailure as error:
        raise _exit(1, f"failed: {error}") from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise _exit(1, f"failed: out of memory ({' '.join(str(error).split())[:200]}); {_LESS_MEMORY}") from None
    except KeyboardInterrupt as stopped:
        raise _exit(130, str(stopped) or "stopped at once; the last checkpoint is whole") from None
    finally:
        log.removeHandler(handler)


def _exit(code: int, sentence: str) -> typer.Exit:
    err.print(printable(sentence), style="red", soft_wrap=True)
    return typer.Exit(code)


def _command(name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command that turns ``UserError`` and ``RunFailure`` into one sentence and an exit code."""
    return lambda function: app.command(name)(_in_sentences()(function))


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"nanogrpo {plugins.version()}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and stop")]


@app.callback()
def _options(version: Version = False) -> None:
    pass


@_command()
def train(
    run_file: Annotated[str | None, typer.Argument(metavar="RUN.toml", help="the run; see deploy/configs")] = None,
    words: Words = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check all that needs no loaded model, then stop")] = False,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN_DIR", help="go on with this run")] = None,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="resume the run in run.folder if there is one, else start it")
    ] = False,
) -> None:
    """Train: sample, score, learn, sync, every step."""
    config, folder, resuming = _resolve(run_file, words or [], resume, auto_resume)
    if dry_run:
        from deploy.dry_run import dry_run as check

        check(config, folder, out, resume=resuming)
        return
    if config.cluster.mode == "ray":
        from deploy.cluster import supervisor

        if not supervisor.is_driver():
            # The process that does the work is a child of this one, which starts it again when it is killed.
            restarts, pulse_s = config.cluster.max_restarts, config.timeouts.pulse_s
            raise typer.Exit(supervisor.supervise(folder, restarts, pulse_s, resuming=resuming))
    _run(config, folder, resuming)


def _resolve(
    run_file: str | None, words: list[str], resume: Path | None, auto_resume: bool
) -> tuple[Config, Path, bool]:
    """The run's configuration and folder, and whether it goes on with what is there."""
    if resume is not None:
        if run_file is not None and "=" not in run_file:
            raise UserError(f"--resume takes the run's own configuration; leave {run_file!r} out")
        from deploy import run as runs

        # `--resume RUN_DIR section.key=value` has no run file.
        config = runs.config_of(resume, [run_file, *words] if run_file is not None else words)
        folder, resuming = resume, True
    else:
        if run_file is None:
            raise UserError("which run? Give a RUN.toml (complete ones are in deploy/configs/) or --resume RUN_DIR")
        config = load(Path(run_file), words)
        if auto_resume and "{date}" in config.run.folder:
            raise UserError(f"--auto-resume needs a fixed folder, and run.folder={config.run.folder!r} has a date")
        from deploy import run as runs

        folder = runs.folder_of(config)
        resuming = auto_resume and runs.begun(folder)
        if resuming:
            config = runs.same_run(folder, config)
    return config, runs.shared_folder(folder) if config.cluster.mode == "ray" else folder, resuming


def _run(config: Config, folder: Path, resuming: bool) -> None:
    from deploy import report
    from deploy import run as runs

    out.print(f"run     {folder}", soft_wrap=True)
    try:
        outcome = runs.run(config, folder, out, resume=resuming)
    except RunFailure as error:
        if any((folder / "checkpoints").glob("step-*")):
            raise RunFailure(f"{error}. Go on from the last checkpoint: nanogrpo train --resume {folder}") from None
        raise
    if not outcome.finished:
        out.print(
            f"saved at step {outcome.step}; go on with: nanogrpo train --resume {folder}; its model as it is now: "
            f"nanogrpo export {folder}",
            soft_wrap=True,
        )
        raise typer.Exit(130)
    if outcome.before is not None and outcome.after is not None:
        out.print(Stack(report.transcripts(outcome.before, outcome.after), report.table(outcome.before, outcome.after)))
    done = "done" if not outcome.unlearned else f"done, but {outcome.unlearned}"
    report_file = f", report in {folder / 'report.html'}" if config.run.report else ""
    out.print(f"{done}: model in {folder / 'final'}{report_file}", soft_wrap=True)


@_command()
def plan(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="the run; see deploy/configs")],
    words: Words = None,
    device_memory: Annotated[str, typer.Option("--device-memory", metavar="SIZE", help="8GiB: a card like that")] = "",
    limit_s: Annotated[float, typer.Option("--limit-s", min=0.0, help="seconds to search for changes")] = 45.0,
    json: Json = False,
) -> None:
    """Work out the run's peak memory, and what would make it fit or how far it can grow. Loads no weights."""
    from deploy.memory_plan import output as plans

    config = load(run_file, words or [])
    try:
        found, proposals, limits = plans.answer(
            config, device_memory, lambda text: err.print(text, style="dim", soft_wrap=True), limit_s=limit_s
        )
    except (UserError, RunFailure):
        raise
    except Exception as error:  # a model whose code asks for numbers
        raise RunFailure(f"this run cannot be planned: its model does not run on shapes alone ({error})") from error
    if json:
        _print_json(plans.as_dict(found, proposals, limits))
    else:
        plans.show(found, out, proposals, limits)


def _print_json(value: object) -> None:
    text = atomic_files.to_json(value)
    if "utf" not in (sys.stdout.encoding or "").lower():
        text = json.dumps(json.loads(text))  # escaped: any encoding has these characters
    sys.stdout.write(text + "\n")


@_command("eval")
def evaluate(model: Model, words: Words = None, json: Json = False, step: Step = None) -> None:
    """Measure accuracy on a task's test questions (task.name=..., eval.questions=..., eval.samples=...)."""
    from common.rewards.scorer import Scorer
    from common.tracking.console import evaluation_line
    from deploy import components
    from deploy.export import open_model

    with open_model(model, words or [], step) as (config, adapter, label):
        if not config.eval.questions:
            raise UserError("eval.questions=0 asks nothing; set it to at least 1")
        ready = components.prepare(config, need_train=False)
        with Scorer(config.task) as scorer:
            made = components.make_sampler(ready, shares_device=False, adapter_folder=adapter)
            with components.closing(made, config) as sampler:
                result = components.ask_test_questions(ready, sampler, scorer, config.timeouts.generate_s).as_dict()
    if json:
        _print_json(result)
        return
    out.print(evaluation_line(0, result).replace("step 0", label), soft_wrap=True)
    for kind, part in result["by_kind"].items():
        out.print(f"  {printable(kind)}: {part['accuracy']:.1%} of {part['questions']}")
    for k, at_k in result["pass_at_k"].items():
        out.print(f"  pass@{k}: {at_k['value']:.1%} [{at_k['low']:.1%}, {at_k['high']:.1%}]")


@_command()
def sample(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(metavar='["prompt" | section.key=value]...')] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="completions of each prompt")] = 1,
    greedy: Annotated[bool, typer.Option("--greedy", help="the likeliest token at every place")] = False,
    questions: Annotated[int, typer.Option(min=0, help="ask this many test questions of the task instead")] = 0,
    step: Step = None,
) -> None:
    """Print completions; with task.name=... or --questions also their rewards."""
    from deploy.export import open_model
    from deploy.sample import completions

    words = [word for word in prompts or [] if _is_setting(word)]
    texts = [word for word in prompts or [] if word not in words]
    if bool(texts) == bool(questions):
        raise UserError('give a prompt, as in: nanogrpo sample MODEL "What is 2 + 2?", or --questions 3')
    scored = bool(questions) or any(word.startswith("task.name=") for word in words)
    with open_model(model, words, step) as (config, adapter, _):
        completions(config, adapter, texts, questions, n, greedy, scored, out)


def _is_setting(word: str) -> bool:
    head, equals, _ = word.partition("=")
    return bool(equals) and head.split(".")[0] in Config.model_fields and "." in head


@_command()
def export(
    run: RunDir,
    folder: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="RUN_DIR/exported/step-N if left out")] = None,
    step: Step = None,
    merged: Annotated[bool, typer.Option("--merged", help="LoRA: the base with the adapter in it")] = False,
) -> None:
    """Write the model of a run's checkpoint, the newest or that of --step, as a Hugging Face folder."""
    from deploy.export import export_checkpoint

    path, number = export_checkpoint(run, step, merged, folder)
    out.print(f"model of step {number} in {path}", soft_wrap=True)


@_command()
def report(run: RunDir) -> None:
    """Write report.html and report.png of a run: finished, stopped, killed or running."""
    from deploy import extras
    from deploy import report as reports
    from deploy.export import check_is_run

    extras.need("matplotlib", "report", "nanogrpo report", "read metrics.jsonl, which has the same numbers")
    check_is_run(run)
    for path in reports.build(run):
        out.print(str(path), soft_wrap=True)


@_command()
def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="every node of the Ray cluster, and between them")] = False,
    address: Annotated[str, typer.Option(help="as cluster.address: auto, HOST:PORT or private")] = "auto",
    folder: Annotated[str, typer.Option(help="a run folder: is it on storage that every node sees?")] = "",
) -> None:
    """Check versions, devices, memory, disk, ports and token, and say what to do."""
    from deploy.doctor.diagnose import diagnose

    if not diagnose(out, cluster, address, folder):
        raise typer.Exit(1)


@_command()
def tasks() -> None:
    """The tasks installed here."""
    _list("task")


@_command()
def samplers() -> None:
    """The sampler back ends installed here."""
    _list("sampler")


def _list(kind: Literal["task", "sampler"]) -> None:
    for name, description in plugins.installed(kind):
        out.print(Text.assemble((f"{name:16}", "bold"), description), soft_wrap=True)
    out.print(Text(f"your own: {kind}.name=module:attr or file.py:attr", style="dim"))


@_command()
def server(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="a run with sampler.name=remote")],
    words: Words = None,
) -> None:
    """Print the command that starts the vLLM server which a run with sampler.name=remote needs."""
    from deploy import components
    from sampler.server.command import server_command, shell_line

    config = load(run_file, words or [])
    if config.sampler.name != "remote":
        raise UserError(f"sampler.name={config.sampler.name!r} needs no server; this is for sampler.name='remote'")
    ready = components.prepare(config)
    setup = components.sampler_setup(ready, shares_device=False)
    command = server_command(setup, str(config.sampler.options["url"]))
    sys.stdout.write(shell_line(*command) + "\n")


@_command()
def config(
    section: Annotated[str, typer.Argument(metavar="[SECTION]", help="this section, or this one key, alone")] = "",
    toml: Annotated[Path | None, typer.Option("--toml", metavar="FILE", help="write a commented file")] = None,
) -> None:
    """Every setting with its default, unit and effect."""
    shown = [(key, field) for key, field in fields() if section in ("", key, key.split(".")[0])]
    if not shown:
        close = meant_by(section)
        hint = f"did you mean {close!r}?" if close else f"there are {', '.join(Config.model_fields)}"
        raise UserError(f"config {section!r}: no such section or key; {hint}")
    if toml is not None:
        if section:
            raise UserError(f"config {section!r} has no effect with --toml, which writes every section; leave it out")
        if toml.exists():
            raise UserError(f"--toml {str(toml)!r} exists already; choose another name")
        atomic_files.write_text(toml, commented_toml())
        out.print(f"wrote {toml}")
        return
    table = Table("key", "default", "meaning", show_lines=True)
    for key, field in shown:
        table.add_row(Text(key), Text(repr(field.default)), Text(described(key, field).replace("``", "")))
    out.print(table)


main = app
"""The console script."""

if __name__ == "__main__":
    main()
