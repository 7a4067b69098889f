"""Examples are scripts: they are loaded from their files."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture
def example():
    def load(name):
        path = Path(__file__).parents[2] / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
