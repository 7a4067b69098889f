"""Examples are scripts: they are loaded from their files."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


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
