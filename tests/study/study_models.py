"""Models that studies in the tests are of, named as study_models.py:NAME."""

import os
import time

import torch
from torch import nn


def _net(seed, classes=10):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, classes),
    )  # fmt: skip
    model.family = f"net{seed % 2}"
    model.pretrained_cfg = {"input_size": (1, 16, 16), "mean": (0.2,), "std": (0.3,), "crop_pct": 1.0}
    return model


def a():
    return _net(0)


def b():
    return _net(1)


def c():
    return _net(2)


def d():
    return _net(3)


def e():
    return _net(4)


def slow():
    """Waits until the test has killed the process, if it wants to."""
    while os.path.exists(os.environ.get("STUDY_WAIT", "/nonexistent")):
        time.sleep(0.05)
    return _net(5)


def bare():
    model = _net(6)
    del model.pretrained_cfg
    return model


def three_classes():
    return _net(7, classes=3)


def breaks():
    raise RuntimeError("no such\nweights")


def no_model():
    return 3


def out_of_memory():
    class Greedy(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    return Greedy()


shape = (1, 2)
