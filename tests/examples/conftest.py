"""Examples are scripts: they are loaded from their files."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture
def example(monkeypatch):
    def load(name):
        path = Path(__file__).parents[2] / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # some libraries look classes up there
        spec.loader.exec_module(module)
        return module

    return load
