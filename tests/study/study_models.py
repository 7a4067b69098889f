"""Models that studies in the tests are of, named as study_models.py:NAME."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

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
    wait = Path(os.environ.get("STUDY_WAIT", "/nonexistent"))
    if wait.exists():
        wait.with_suffix(".reached").touch()
    while wait.exists():
        time.sleep(0.05)
    return _net(5)


def dies():
    """Takes its process with it, and leaves a mark."""
    with open(os.environ["STUDY_DEATHS"] + "/dies", "a") as marks:
        marks.write("x")
    os.kill(os.getpid(), signal.SIGKILL)


def dies_once():
    mark = Path(os.environ["STUDY_DEATHS"]) / "dies_once"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return _net(1)


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


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = _net(0), wrap
        self.pretrained_cfg = self.inner.pretrained_cfg

    def forward(self, x):
        return self.wrap(self.inner(x))


def with_logits():
    return Wrapped(lambda y: SimpleNamespace(logits=y, hidden=y[:, :3]))


def with_dict():
    return Wrapped(lambda y: {"out": y, "aux": y.flip(1)})


def with_tuple():
    return Wrapped(lambda y: (y, y.flip(1)))


def with_pred():
    return Wrapped(lambda y: {"pred": y, "aux": y[:, :3]})


def half():
    return _net(0).half()


def rgb():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))


def three(returned):
    """For --output: the first three scores."""
    return returned[:, :3]


shape = (1, 2)
