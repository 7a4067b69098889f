"""What is released: the distribution's contents, and the wheel as those have it who install it."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LARGEST = 200_000
"""Bytes of a file in the source distribution: nothing but code and text."""


def run(*command, cwd):
    """The output of a command that must succeed, which sees no source of the package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution, and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """The Python of an environment with the wheel, which finds its dependencies among the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index",
        distributions[1], cwd=folder)  # fmt: skip
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(site, "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    found = "import importlib.util; print(importlib.util.find_spec('lie_metric').origin)"
    assert Path(run(python, "-c", found, cwd=folder).strip()) == Path(site, "lie_metric", "__init__.py")
    return python


def test_contents(distributions):
    source, wheel = distributions
    run(sys.executable, "-m", "twine", "check", "--strict", source, wheel, cwd=ROOT)
    run(sys.executable, "-m", "check_wheel_contents", "--no-config", "--package", ROOT / "lie_metric", wheel, cwd=ROOT)
    with tarfile.open(source) as archive:
        files = {member.name.partition("/")[2]: member.size for member in archive if member.isfile()}
    wanted = {
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "lie_metric/py.typed",
        "lie_metric/study/report.html",
    }
    for folder in ("lie_metric", "tests", "examples"):
        wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
    wanted |= {"tests/reference_values.json"}
    assert not wanted - set(files)
    assert not {name: size for name, size in files.items() if size > LARGEST}


def test_metadata(distributions):
    with zipfile.ZipFile(distributions[1]) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(path).decode().splitlines()
    text = (ROOT / "lie_metric/version.py").read_text()
    (version,) = re.findall(r"__version__ = \"(.+)\"", text)
    assert f"Version: {version}" in lines
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.10", "Classifier: Typing :: Typed"):
        assert line in lines


def test_command(installed, tmp_path):
    command = installed.parent / "lie-metric"
    assert re.fullmatch(r"lie-metric \d+\.\d+\.\d+\S*\n", run(command, "--version", cwd=tmp_path))
    told = run(command, "--help", cwd=tmp_path)
    assert all(name in told for name in ("study", "report", "compare"))


def test_first_lines_of_the_readme(installed, tmp_path):
    part = (ROOT / "README.md").read_text().partition("## In your own training")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.+?)^```$", part, re.DOTALL | re.MULTILINE)
    assert "EquivarianceMonitor" in blocks[0]
    assert "Recorder" in blocks[1]
    given = """
import torch
from lightning.pytorch import Trainer
model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(400, 3))
images = val_images = torch.rand(8, 1, 12, 12)
step = 0
"""
    program = tmp_path / "program.py"
    program.write_text("\n".join([given, *blocks]))
    run(installed, "-W", "ignore", program, cwd=tmp_path)
    assert (tmp_path / "runs/mine/equivariance.jsonl").exists()


def test_types_of_the_public_names(installed, tmp_path):
    """A program that uses the installed package stands the strictest checks, and no public value is of any type."""
    program = tmp_path / "consumer.py"
    program.write_text((ROOT / "tests/consumer.py").read_text())
    check = ("-m", "mypy", "--strict", "--python-executable", installed, "--cache-dir", tmp_path / "cache")
    assert "no issues found in 1 source file" in run(sys.executable, *check, program, cwd=tmp_path)
    # And it would see what is wrong.
    program.write_text("import lie_metric as lm\nlm.LocalEquivarianceError('affine').names.sort()\n")
    with pytest.raises(AssertionError, match=r'"tuple\[str, ...\]" has no attribute "sort"'):
        run(sys.executable, *check, program, cwd=tmp_path)
