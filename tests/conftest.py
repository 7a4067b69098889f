"""One thread and a fixed global seed for every test."""

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
