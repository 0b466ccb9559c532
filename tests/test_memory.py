"""The memory plan: what it counts against what torch holds, its verdict, and that its proposals are runs that fit."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from common.config import load
from common.errors import UserError
from common.memory import GIB
from deploy.cli import app
from deploy.components import resolve_dtype
from deploy.memory_plan import estimate, search
from deploy.memory_plan import output as plans
from deploy.memory_plan.estimate import DeviceSpec, Planner
from learner import memory_estimate
from learner.rehearsal import longest_groups
from learner.torch_learner import TorchLearner
from sampler.engine import arguments
from sampler.engine import memory as vllm_memory
from tests.benchmarks import shapes
from tests.tiny import make_tiny

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "deploy" / "configs"
measured = memory_estimate.measure


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with the shape alone."""
    return shapes.write("Llama-3.2-1B", tmp_path_factory.mktemp("shapes"))


def config_of(folder, *words):
    return load(None, [f"model.name={folder}", "model.dtype=bfloat16", "train.prompts_per_step=4",
                       "train.group_size=4", "sampler.max_tokens=24", "learner.microbatch_tokens=256",
                       *words])  # fmt: skip


class RealTracker(memory_estimate.MemoryTracker):
    """The same count over real tensors while the learner really computes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, self._category_of(leaf, func is torch.ops.aten.zeros_like.default))
        return out


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("model.lora_rank=4",),
        ("learner.gradient_checkpointing=true",),
        ("optimizer.name=adamw_8bit", "optimizer.master=stochastic"),
        ("learner.packing=padded",),
        ("learner.kl_coef=0.1", "learner.importance_level=sequence"),
    ],
    ids=" ".join,
)
def test_shapes_alone_take_what_the_real_pass_takes(tiny, words):
    """The tensors alive at the peak of a real rehearsal are those that the plan saw, within what the C library's own
    kernels and index tensors (which the plan sees only on their way to the device) make of it."""
    config = config_of(tiny, *words)
    planned = {phase: sum(parts.values()) for phase, parts in measured(config, tiny, 40, on_cpu=True).phases.items()}
    learner = TorchLearner(config, tiny, "cpu")
    tracker = RealTracker(learner.vocabulary)
    for category, tensors in learner.tensors_by_category().items():
        tracker.watch(category, tensors)
    tracker.phase = "learn"
    with tracker:
        learner.rehearse(longest_groups(config, 40))
    load, learn = (sum(tracker.peaks[phase].values()) for phase in ("load", "learn"))
    assert max(planned["learn"], planned["step"]) == pytest.approx(learn, rel=0.1)
    assert planned["load"] == pytest.approx(load, rel=0.02)


def test_weights_masters_and_moments_are_counted_to_the_byte(llama):
    planned = measured(config_of(llama), llama, 64, on_cpu=False)
    assert planned.parameters_trained == planned.parameters_total == 1_235_814_400
    parts = planned.phases["load"]
    assert parts["weights"] == pytest.approx(2 * 1_235_814_400, rel=1e-4)
    assert parts["float32 master weights"] == 4 * 1_235_814_400
    assert parts["optimizer"] == pytest.approx(8 * 1_235_814_400, rel=1e-4)
    assert planned.phases["learn"]["gradients"] >= 4 * 1_235_814_400


@pytest.mark.slow
def test_the_shipped_run_for_8_gib_fits_with_room(llama):
    config = resolve_dtype(load(CONFIGS / "gsm8k-8gb.toml", [f"model.name={llama}", "train.device=gpu"]), "gpu")
    plan = Planner(config, llama, config.sampler.max_prompt_tokens, DeviceSpec("GPU", True, 8 * GIB)).plan(config)
    assert plan.fits
    assert plan.margin is not None
    assert plan.margin >= 0.7 * GIB, plans.verdict(plan)
    assert "would not start" not in " ".join(plan.devices[0].sampler.notes)


@pytest.mark.full
def test_every_proposal_is_a_right_configuration_that_fits_by_its_own_plan(tiny):
    config = config_of(tiny, "sampler.max_tokens=100", "train.prompts_per_step=16", "learner.microbatch_tokens=4096",
                       "sampler.name=hf")  # fmt: skip
    needed = Planner(config, tiny, 40, DeviceSpec("host memory", False, 64 * GIB)).plan(config)
    activations = needed.devices[0].phases["learn"]["activations"]
    planner = Planner(config, tiny, 40, DeviceSpec("host memory", False, needed.peak - activations // 3))
    plan = planner.plan(config)
    assert plan.fits is False
    proposal = search.solve(planner, config, 60, lambda text: None)
    assert proposal is not None
    assert [key for option in proposal.options for key, _ in option.changes] == ["learner.microbatch_tokens"]
    changed = search.allowed(config, proposal.options[0].changes)
    assert changed is not None
    again = Planner(changed, tiny, 40, planner.device).plan(changed)
    assert again.fits
    assert again.margin == proposal.margin
    assert plan.peak - again.peak == pytest.approx(proposal.saved[0], rel=0.05)
    # A tenth of what it needs: one setting is not enough, and none that is kept could be done without.
    little = estimate.PROCESS_CPU + (needed.peak - estimate.PROCESS_CPU) // 10
    planner = Planner(config, tiny, 40, DeviceSpec("host memory", False, little))
    proposal = search.solve(planner, config, 60, lambda text: None)
    assert proposal is not None
    assert len(proposal.options) > 1
    for option in proposal.options:
        others = [change for other in proposal.options if other is not option for change in other.changes]
        without = search.allowed(config, others)
        assert without is None or not planner.plan(without).fits


def test_the_quicker_format_is_proposed_to_whoever_chose_the_larger(tiny):
    asked = [config_of(tiny, f"model.dtype={dtype}") for dtype in ("float32", "bfloat16")]
    changes = [[option.changes for row in search.settings(config, True, ()) for option in row] for config in asked]
    assert [(("model.dtype", "bfloat16"),) in row for row in changes] == [True, False]


def test_the_sampler_says_what_it_takes(tiny):
    """vLLM by its own rule; one that does not say is counted as nothing, with a note."""
    config, model = config_of(tiny), json.loads((tiny / "config.json").read_text())
    planner = Planner(config, tiny, 40, DeviceSpec("host memory", False, 64 * GIB))
    assert planner.sampler(config).cache == arguments.cache_bytes(model, planner.setup(config))
    silent = planner.sampler(config_of(tiny, "sampler.name=scripted"))
    assert (silent.held, silent.activations) == ({}, 0)
    assert "counted as nothing" in silent.notes[0]


def test_sizes_and_places():
    assert estimate.size_of("8GiB") == 8 * GIB
    assert estimate.size_of("24 GB") == 24 * 10**9
    assert estimate.size_of("1.5") == int(1.5 * GIB)
    with pytest.raises(UserError, match="--device-memory"):
        estimate.size_of("much")
    assert estimate.device_of(load(None, ["train.device=cpu"]), "4GiB") == DeviceSpec("host memory", False, 4 * GIB)
    assert estimate.device_of(load(None, ["cluster.mode=ray", "train.device=gpu"])).bytes is None


def call(*words):
    return CliRunner().invoke(app, [*map(str, words), f"task.name={ROOT / 'tests' / 'toy.py'}:Toy"])


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_before_models_are_loaded(tiny, tmp_path):
    refused = call("train", CONFIGS / "demo.toml", f"model.name={tiny}", "sampler.name=hf", "sampler.max_tokens=8",
                   "train.steps=1", "train.prompts_per_step=2", "train.group_size=2", "train.device=cpu",
                   "optimizer.warmup_steps=0", "eval.questions=0", f"run.folder={tmp_path / 'run'}",
                   "memory.device_gib=0.1")  # fmt: skip
    assert refused.exit_code == 2, refused.output
    assert "does not fit" in " ".join(refused.stderr.split())
    assert "memory.plan='warn'" in " ".join(refused.stderr.split())
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_the_plan_as_json(tiny):
    ran = call("plan", CONFIGS / "demo.toml", f"model.name={tiny}", "train.device=gpu", "--device-memory", "8GiB",
               "--limit-s", "4", "--json")  # fmt: skip
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    assert said["units"] == {"memory": "bytes", "lengths": "tokens"}
    assert said["fits"] is True
    device, host = said["devices"]
    assert (host["gpu"], host["memory"]) == (False, None)
    assert device["memory"] == 8 * GIB
    assert set(device["phases"]) == {"load", "sample", "score", "learn", "sync", "save"}
    for phase in device["phases"].values():
        assert phase["total"] == sum(size for name, size in phase.items() if name != "total")
    assert device["peak"] == max(phase["total"] for phase in device["phases"].values())
    assert device["margin"] == 8 * GIB - device["peak"]
    assert said["largest"]["sampler.max_tokens"] > 16


def on_a_gpu(folder, *words, card=8 * GIB, **device):
    config = config_of(folder, "sampler.name=vllm", "train.device=gpu", "model.lora_rank=8", *words)
    return Planner(config, folder, 64, DeviceSpec("GPU", True, card, **device)).plan(config)


@pytest.mark.slow
def test_vllms_share_comes_on_top_of_the_context_and_holds_its_graphs(llama):
    """gpu_worker.py of vLLM 0.32: the snapshot is taken when the context exists; the graphs' estimate is taken off."""
    for eager in ("true", "false"):
        plan = on_a_gpu(llama, "sampler.options.gpu_memory_utilization=0.5", f"sampler.options.enforce_eager={eager}")
        parts = dict(plan.devices[0].phases["sample"])
        of_vllm = ("sampler weights", "sampler activations", "CUDA graphs", "KV cache")
        assert sum(parts.get(name, 0) for name in of_vllm) == 4 * GIB
        assert ("CUDA graphs" in parts) == (eager == "false")
        assert parts["CUDA context"] == estimate.CONTEXT
        assert parts["vLLM besides"] == vllm_memory.UNSEEN
        learns = plan.devices[0].phases["learn"]
        assert ("KV cache" in learns, "sampler weights" in learns) == (False, False)
        assert learns.get("CUDA graphs") == parts.get("CUDA graphs")


@pytest.mark.slow
def test_the_share_is_of_the_whole_card_and_must_be_free(llama):
    words = ("sampler.options.gpu_memory_utilization=0.75", "sampler.options.kv_cache_memory_bytes=268435456")
    plan = on_a_gpu(llama, *words)
    assert plan.devices[0].sampler.cache == 256 << 20  # fixed: the share does not change it
    crowded = on_a_gpu(llama, *words, card=6 * GIB, whole=8 * GIB)
    assert crowded.devices[0].phases["sample"] == plan.devices[0].phases["sample"]
    assert crowded.devices[0].sampler.shortfall == estimate.CONTEXT
    assert crowded.fits is False
    assert "0.50 GiB more than is free when it starts" in crowded.devices[0].sampler.notes[0]


@pytest.mark.slow
def test_a_step_of_vllms_profile_has_its_batched_tokens(llama):
    few, many = (on_a_gpu(llama, f"sampler.options.max_num_batched_tokens={count}") for count in (512, 8192))
    low, high = (plan.devices[0].phases["sample"]["sampler activations"] for plan in (few, many))
    assert low < high / 4
    assert [vllm_memory.default_batched_tokens(card) for card in (None, 24 * GIB, 80 * GIB)] == [4096, 8192, 16384]


@pytest.mark.slow
def test_what_waits_in_host_memory_is_planned(llama):
    """Level 1 keeps vLLM's base there, the learner's own copies stay there, and the challenge keeps what it changes."""
    plan = on_a_gpu(llama, "memory.offload_while_sampling=true", host=12 * GIB)
    gpu, host = plan.devices
    weights = 2 * 1_235_814_400
    resident = sum(size for name, size in gpu.phases["load"].items() if name in ("weights", "optimizer"))
    assert host.phases["learn"]["sleeping sampler's weights"] == gpu.phases["sample"]["sampler weights"] > weights
    assert host.phases["sample"]["the learner's copies"] == pytest.approx(resident, rel=0.01)
    assert "sleeping sampler's weights" not in host.phases["sync"]
    assert host.phases["sync"]["challenge's copies"] == plan.learner.trained_bytes
    assert plan.fits
    assert on_a_gpu(llama, "memory.offload_while_sampling=true", host=4 * GIB).fits is False
    assert plan.peak == gpu.peaks[gpu.worst]  # the host's is not the card's


def test_full_weights_of_llama_1b_do_not_fit_8_gib(llama):
    """By the settings that docs/memory.md names for full weights."""
    config = load(None, [f"model.name={llama}", "model.dtype=bfloat16", "train.device=gpu", "sampler.max_tokens=300",
                         "learner.microbatch_tokens=512", "learner.head_tokens=128",
                         "learner.gradient_checkpointing=true", "memory.offload_while_sampling=true",
                         "optimizer.offload=true", "sampler.options.enforce_eager=true",
                         "sampler.options.gpu_memory_utilization=0.5",
                         "sampler.options.max_num_batched_tokens=2048"])  # fmt: skip
    plan = Planner(config, llama, 512, DeviceSpec("GPU", True, 8 * GIB)).plan(config)
    assert plan.fits is False
    assert "(sync)" in plans.verdict(plan)


def test_options_of_the_sampler_are_turned_one_by_one(tiny):
    config = config_of(tiny, "sampler.name=vllm", "sampler.options.kv_cache_memory_bytes=1073741824")
    cheaper = Planner(config, tiny, 40, DeviceSpec("GPU", True, 8 * GIB)).sampler(config).cheaper
    changes = {option.changes[0] for row in search.settings(config, True, cheaper) for option in row}
    assert {
        ("sampler.options.kv_cache_memory_bytes", 512 << 20),
        ("sampler.options.max_num_batched_tokens", 4096),
    } <= changes
    both = [("sampler.options.kv_cache_memory_bytes", 1 << 28), ("sampler.options.max_num_batched_tokens", 512)]
    assert search.allowed(config, both).sampler.options == {
        "kv_cache_memory_bytes": 1 << 28, "max_num_batched_tokens": 512,
    }  # fmt: skip


def test_staleness_that_overlaps_nothing_more_is_refused():
    ray = ["cluster.mode=ray", "train.max_staleness=2"]
    with pytest.raises(UserError, match=r"train\.max_staleness=2 overlaps no more than 1.*in_flight_updates=true"):
        load(None, ray)
    assert load(None, [*ray, "sampler.in_flight_updates=true"]).train.max_staleness == 2
