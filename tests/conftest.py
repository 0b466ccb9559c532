"""One thread a test process: on tiny models more threads only wait for each other, many times longer on a busy machine."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
