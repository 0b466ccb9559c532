"""One thread a test process: on tiny models and a busy machine more threads mostly wait for each other."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
