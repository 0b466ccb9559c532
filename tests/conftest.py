"""One thread a test process: on tiny models and a busy machine more threads mostly wait for each other. And what Ray
reads when it is imported, by whichever test is first: tokens are asked for, nothing listens beyond loopback, and its
processes are not kept behind a busy machine's others, or healthy ones would show no pulse."""

import gc
import os
import sys

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_worker_niceness", "0")


# Searches for counterexamples are short in make test and long in make test-full.
settings.register_profile("short", max_examples=20, deadline=None)
settings.register_profile("long", max_examples=200, deadline=None)
settings.load_profile("long" if os.environ.get("NANOGRPO_TESTS") == "full" else "short")


def pytest_collection_modifyitems(items):
    """Marks the searches, and puts the files that take longest first: two workers then end together."""
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.property)
    items.sort(key=lambda item: _DEAR.index(item.path.stem) if item.path.stem in _DEAR else len(_DEAR))


_DEAR = [
    *("test_two_nodes", "test_cluster", "test_vllm", "test_cli", "test_run", "test_real_model", "test_remote"),
    *("test_lora", "test_sampler_contract", "test_parallel", "test_learner", "test_memory", "test_rewards"),
]
_modules = 0


def pytest_runtest_setup(item):
    """Hides what imports have made from the garbage collector. vLLM collects ten times in an engine's life, at half a
    second each over all that torch and transformers hold; and at its end it shows the collector everything again."""
    global _modules
    if len(sys.modules) > _modules + 50:
        _modules = len(sys.modules)
        gc.collect()
        gc.freeze()
    elif item.get_closest_marker("vllm"):  # to ask whether that is needed takes as long as a collection
        gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or libraries report their objects as leaked


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
