"""The layout and who may import whom, held by the source itself."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("common", "sampler", "learner", "deploy")
ALLOWED = {
    "common": {"common"},
    "sampler": {"common", "sampler"},
    "learner": {"common", "learner"},
    "deploy": set(PARTS),
}
HOME = {
    "ray": ("deploy/",),
    "vllm": ("sampler/",),
    "datasets": ("common/tasks/",),
    "transformers": ("learner/model/", "learner/attention/packed_cpu.py", "sampler/hf.py", "common/tokenizer.py"),
    "peft": ("learner/model/", "sampler/hf.py"),
    "wandb": ("common/tracking/trackers.py",),
    "trackio": ("common/tracking/trackers.py",),
    "mlflow": ("common/tracking/trackers.py",),
}
SOURCES = sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dependencies() -> dict[str, set[str]]:
    """Of each file of ours the others that it imports, inside functions too; not for types alone."""
    names = {path: name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in SOURCES}
    ours, found = set(names.values()), {}
    for path, module in names.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                node.body = []
        wanted = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        found[module] = (wanted & ours) - {module} - ({module.rpartition(".")[0]} & {*PARTS})
    return found


def test_no_file_imports_itself_by_way_of_others():
    try:
        graphlib.TopologicalSorter(dependencies()).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_top_level_is_the_design():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line}
    assert folders <= {*PARTS, "tests", "docs", ".ci"}, folders


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_parts_import_only_what_the_layers_allow(path):
    part = name(path).split("/")[0]
    ours = {module.split(".")[0] for module in imports(path)} & set(PARTS)
    assert ours <= ALLOWED[part], f"{name(path)} imports {ours - ALLOWED[part]}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_heavy_packages_have_one_home(path):
    for module in {module.split(".")[0] for module in imports(path)} & HOME.keys():
        assert name(path).startswith(HOME[module]), f"{name(path)} imports {module}, whose home is {HOME[module]}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_one_file_names_the_accelerator(path):
    if name(path) != "common/device.py":
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) else getattr(node, "attr", None)
            assert not (isinstance(text, str) and text.split(":")[0] == "cuda"), f"{name(path)} says cuda"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name(path)} has no docstring"


@pytest.mark.parametrize("module", ["common.types", "common.config", "common.protocols", "common.rewards"])
def test_light_modules_import_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
