"""One thread and a fixed global seed for every test."""

import multiprocessing
import os

# Before anything computes, and for the processes that tests start: tests run side by side, one process for each core.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
# Processes that a test starts are forked from one that has imported what is large.
multiprocessing.set_forkserver_preload(["lie_metric"])
# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
