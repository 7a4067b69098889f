"""Examples are scripts: they are loaded from their files."""

import importlib
import importlib.util
import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def as_found():
    """Programs say less and take fewer threads in their own process; here others come after them."""
    logger = logging.getLogger("lightning.pytorch")
    level, threads = logger.level, torch.get_num_threads()
    with warnings.catch_warnings():
        yield
    logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)  # a process of a pool finds them there

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # some libraries look classes up there
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def networks(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("networks")
