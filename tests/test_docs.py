"""README, CONTRIBUTING and docs/ say what is there: links, files, commands, settings, numbers that code knows."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from common.config import build, fields
from deploy.cli import app
from tests import metrics_page

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARTS = ("common", "sampler", "learner", "deploy")
FILES = {path.relative_to(ROOT).as_posix() for part in PARTS for path in (ROOT / part).rglob("*.py")}
KNOWN = {key for key, _ in fields()}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file, _, part = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if part:
            assert part in {anchor(line) for line in re.findall(r"(?m)^#+ (.*)$", path.read_text())}, target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_settings_that_are_named_exist(page):
    text = page.read_text()
    for path in re.findall(r"`((?:common|sampler|learner|deploy|tests|docs)/[\w./*-]+\.\w+)`", text):
        assert list(ROOT.glob(path)), path
    sections = "|".join(sorted({key.partition(".")[0] for key in KNOWN}))
    # In code only, and no file, field of an example or function: `run.log`, `model.resize_token_embeddings`.
    named = {key for code in re.findall(r"`([^`\n]+)`", text) for key in
             re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z_]+)\b(?![/(.])", code)}  # fmt: skip
    named -= {"run.log", "eval.jsonl"}
    assert named <= KNOWN, named - KNOWN


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page):
    text = re.sub(r"\\\n\s*", " ", "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)))
    text += "\n".join(re.findall(r"`((?:nanogrpo|python -m|make) [^`\n]+)`", page.read_text()))
    for words in re.findall(r"(?m)(?:\bnanogrpo|python -m deploy\.cli) +([a-z][^|;&#`\n\]]*)", text):
        subcommand, *rest = shlex.split(words.split(" -- ")[0])
        assert subcommand in get_command(app).commands, words
        options = {option for parameter in get_command(app).commands[subcommand].params for option in parameter.opts}
        assert {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)} <= options | {"--help"}, words
        settings = {word.partition("=")[0] for word in rest if re.match(r"[a-z_]+\.[a-z_]+=", word)}
        assert settings <= KNOWN, words
    for module in re.findall(r"python -m (tests[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    assert set(re.findall(r"(?m)^\s*make ([a-z-]+)", text)) <= targets


def test_metrics_page_is_what_the_code_says():
    assert metrics_page.PAGE.read_text() == metrics_page.page(), "run python -m tests.metrics_page"


def test_readme_is_short_and_names_every_file_and_run():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 200
    tree = readme.partition("## The files")[2]
    unnamed = {path for path in FILES if not re.search(rf"\b{Path(path).name}\b", tree)}
    assert {path for path in unnamed if not path.endswith("__init__.py") and "/tasks/" not in path} == set()
    assert not [path.name for path in (ROOT / "deploy" / "configs").glob("*.toml") if path.name not in readme]


def test_readme_run_file_is_one():
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert build(tomllib.loads(text)).train.steps == 100
