"""Which number format ``model.dtype="auto"`` is, where, and that a run writes it down and keeps it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from common import device
from common.config import load
from common.errors import UserError
from deploy import components
from deploy import run as runs
from deploy.cluster import connection
from deploy.memory_plan import estimate
from tests.making import QUIET
from tests.tiny import make_tiny

ASKS = """
import sys, ray
from common.config import load
from deploy.cluster import connection
print(connection.takes_gpus(load(None, sys.argv[1:])), ray.is_initialized())
"""
TOY = Path(__file__).parent / "toy.py"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


def test_a_cpu_takes_bfloat16_where_the_kernel_lists_its_instructions():
    listed = Path("/proc/cpuinfo")
    if not listed.exists():
        pytest.skip("not Linux")
    words = set(listed.read_text().split())
    if not words & {"avx2", "avx512f", "bf16"} and torch.cpu.get_capabilities().get("architecture") != "x86_64":
        pytest.skip("a CPU of which this test knows nothing")
    quick = bool(words & {"avx512_bf16", "amx_bf16", "bf16"})  # the last as Arm calls it
    assert device.quick_dtype("cpu") == ("bfloat16" if quick else "float32")


def test_a_gpu_that_is_not_here_takes_bfloat16():
    if torch.cuda.is_available():
        pytest.skip("it is here")
    assert device.quick_dtype("gpu") == "bfloat16"
    assert components.resolve_dtype(load(None), "gpu").model.dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_explicit_format_stays(dtype):
    config = load(None, [f"model.dtype={dtype}"])
    assert components.resolve_dtype(config, "cpu") is config


def test_what_has_no_effect_in_the_format_found_is_said():
    """float32 weights are their own masters; where auto is bfloat16 the same setting works."""
    config = load(None, ["optimizer.master=stochastic"])
    if device.quick_dtype("cpu") == "bfloat16":
        assert components.resolve_dtype(config, "cpu").optimizer.master == "stochastic"
        return
    with pytest.raises(UserError, match=r"model\.dtype='auto' is 'float32' on this CPU, where optimizer\.master="):
        components.resolve_dtype(config, "cpu")


def test_a_run_writes_the_format_down_and_goes_on_with_it(tiny, tmp_path):
    words = [
        f"model.name={tiny}", f"task.name={TOY}:Toy", "sampler.name=hf", "sampler.max_tokens=8", "train.steps=1",
        "train.prompts_per_step=2", "train.group_size=2", "train.device=cpu", "eval.questions=0",
        "optimizer.warmup_steps=0", "run.console=plain", *QUIET,
    ]  # fmt: skip
    found = device.quick_dtype("cpu")
    other = {"bfloat16": "float32", "float32": "bfloat16"}[found]
    for asked, kept in (("auto", found), (other, other)):
        folder = tmp_path / asked
        with open(os.devnull, "w") as nowhere:
            runs.run(load(None, [*words, f"model.dtype={asked}"]), folder, Console(file=nowhere))
        assert load(folder / "config.toml").model.dtype == kept
        assert runs.config_of(folder, ["train.steps=2"]).model.dtype == kept
        assert runs.config_of(folder, ["model.dtype=auto"]).model.dtype == kept
        said = (folder / "run.log").read_text()
        assert ("model.dtype='bfloat16' is many times slower here" in said) == (kept == "bfloat16" != found)


def test_the_plan_is_for_the_device_that_is_asked_about(tiny, caplog):
    words = [f"model.name={tiny}", f"task.name={TOY}:Toy"]
    for more, dtype in (("gpu", "bfloat16"), ("cpu", device.quick_dtype("cpu"))):
        asked = estimate.planner_of(load(None, [*words, f"train.device={more}"]), "8GiB")
        assert asked.config.model.dtype == dtype
    assert "slower" not in caplog.text  # nothing computes here


@pytest.mark.ray
def test_a_cluster_without_gpus_computes_as_this_cpu():
    import ray

    private = load(None, ["cluster.mode=ray", "cluster.address=private"])
    assert not torch.cuda.is_available()
    assert not connection.takes_gpus(private)
    assert components.resolve_dtype(private).model.dtype == device.quick_dtype("cpu")
    with_gpus = load(None, ["cluster.mode=ray", "train.device=gpu", "optimizer.master=stochastic"])
    assert connection.takes_gpus(with_gpus)
    assert components.resolve_dtype(with_gpus).model.dtype == "bfloat16"
    assert not ray.is_initialized()
    assert connection.connect("private")
    try:
        words = ["cluster.mode=ray", f"cluster.address={ray.get_runtime_context().gcs_address}"]
        assert not connection.takes_gpus(load(None, words))
        assert ray.is_initialized()  # one that was joined before is not left
        ran = subprocess.run(
            [sys.executable, "-c", ASKS, *words], cwd=TOY.parent.parent, capture_output=True, text=True, timeout=120
        )
        assert ran.stdout.split() == ["False", "False"], ran.stderr  # and one that was joined to ask is
    finally:
        ray.shutdown()
