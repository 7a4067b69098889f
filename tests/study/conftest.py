"""A command line, settings and names for small studies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")

MODELS = Path(__file__).parent / "study_models.py"
SMALL = ["--data", "digits", "--num-images", "6", "--eval-images", "12", "--quiet"]


@pytest.fixture
def named():
    """Names of models of the file, short in the tables."""
    return lambda letters: [f"{letter}={MODELS}:{letter}" for letter in letters]


@pytest.fixture
def small():
    return SMALL


@pytest.fixture
def process():
    """Starts the command in a process of its own."""

    def start(*arguments, **environment):
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "lie_metric.study", *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
