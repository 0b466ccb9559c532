"""One thread a test process: on tiny models and a busy machine more threads mostly wait for each other. And what Ray
reads when it is imported, by whichever test is first: tokens are asked for, and nothing listens beyond loopback."""

import os

import pytest
import torch

from learner import memory
from learner.apart import Apart

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def one_helper():
    """The plan's helper process, which imports for seconds, serves every run of a test process."""

    class Kept(Apart):
        def close(self):
            pass

    kept, memory.apart = memory.apart, Kept(*memory.apart._imports)
    yield
    memory.apart._end()
    memory.apart = kept
