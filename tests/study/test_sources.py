"""Callables of files, weights of checkpoints, and what of an output is measured."""

import enum
import os
import pathlib
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lie_metric.study.sources import callable_from, load_weights, selection


class Mode(enum.Enum):
    FAST = 1


@dataclass
class Width:
    pixels: int = 3


class Traitor:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Sly(Traitor):
    def __reduce__(self):
        return subprocess.call, (["touch", str(self.path)],)


def write(folder, **files):
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_files_find_what_lies_beside_them(tmp_path):
    zoo = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside import VALUE\n"
        "@dataclass\nclass Config:\n    value: int = VALUE\n"
        "class Models:\n    @staticmethod\n    def late():\n        from beside import late\n        return late()\n"
        "def build():\n    return Config().value\n"
    )
    one = write(tmp_path / "one", zoo=zoo, beside="VALUE = 1\ndef late(): return 10\n")
    two = write(tmp_path / "two", zoo=zoo, beside="VALUE = 2\ndef late(): return 20\n")
    path = list(sys.path)
    builds = [callable_from(f"{folder / 'zoo.py'}:build") for folder in (one, two)]
    late = [callable_from(f"{folder / 'zoo.py'}:Models.late") for folder in (one, two)]
    assert [build() for build in builds] == [1, 2]
    # What is imported when the model is built is looked for beside its own file, whichever came last.
    assert [build() for build in late] == [10, 20]
    assert sys.path == path
    # A file is imported once.
    assert callable_from(f"{one / 'zoo.py'}:build") == builds[0]


def test_a_file_never_takes_the_name_of_another_module(tmp_path):
    folder = write(tmp_path / "names", json="def build(): return 7\n", tabnanny="def build(): return 8\n")
    json = sys.modules["json"]
    assert callable_from(f"{folder / 'json.py'}:build")() == 7
    assert callable_from(f"{folder / 'tabnanny.py'}:build")() == 8
    assert sys.modules["json"] is json
    assert "tabnanny" not in sys.modules


def test_a_file_of_a_package(tmp_path):
    folder = write(tmp_path / "package", zoo="from .net import build\n", net="def build(): return 1\n")
    with pytest.raises(ValueError, match=r"relative import.* A file of a package is given as package.module:callable"):
        callable_from(f"{folder / 'zoo.py'}:build")


@pytest.mark.parametrize(
    "value",
    [
        Mode.FAST, pathlib.Path("a/b"), Width(), {Mode.FAST: pathlib.Path("c")}, defaultdict(list, a=[Mode.FAST]),
        SimpleNamespace(mode=Mode.FAST), torch.optim.SGD,
    ],
)  # fmt: skip
def test_hyperparameters_of_any_class(tmp_path, value):
    trained, model, path = nn.Linear(2, 2), nn.Linear(2, 2), tmp_path / "epoch=1.ckpt"
    torch.save({"state_dict": trained.state_dict(), "hyper_parameters": {"value": value}}, path)
    allowed = set(map(str, torch.serialization.get_safe_globals()))
    assert load_weights(model, path) == "epoch=1"
    assert torch.equal(model.weight, trained.weight)
    # What is allowed is allowed for that file alone.
    assert set(map(str, torch.serialization.get_safe_globals())) == allowed


@pytest.mark.parametrize("kind", [Traitor, Sly])
def test_nothing_of_a_checkpoint_is_run(tmp_path, kind):
    mark, model = tmp_path / "mark", nn.Linear(2, 2)
    torch.save({"state_dict": model.state_dict(), "callback": kind(mark)}, tmp_path / "bad.pt")
    if kind is Traitor:
        with pytest.raises(ValueError, match=r"without running code, got .*bad.pt.*posix.system"):
            load_weights(model, tmp_path / "bad.pt")
    else:
        load_weights(model, tmp_path / "bad.pt")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("saved", "match"),
    [
        (nn.Linear(2, 2), r"dict of weights, got a pickled model .* Save `torch.save\(model.state_dict"),
        ([1], "dict of weights, got a pickled list"),
        ({"weight": Mode.FAST, "bias": torch.zeros(2)}, r"plain tensors, got other objects for \['weight'\]"),
    ],
)  # fmt: skip
def test_what_holds_no_weights(tmp_path, saved, match):
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=match):
        load_weights(nn.Linear(2, 2), tmp_path / "x.pt")


def test_no_checkpoint_at_all(tmp_path):
    (tmp_path / "x.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"hold weights that can be read without running code, got .*x.pt"):
        load_weights(nn.Linear(2, 2), tmp_path / "x.pt")


def test_an_old_file_of_plain_weights(tmp_path):
    trained, model = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(trained.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    load_weights(model, tmp_path / "old.pt")
    assert torch.equal(model.weight, trained.weight)


def test_selection():
    for name, returned in (
        ("pred", {"pred": 3, "aux": 1}), ("pred", SimpleNamespace(pred=3)), ("1", [1, 3]), ("-1", (1, 3)),
        ("1", {1: 3}), ("operator:itemgetter", 3),
    ):  # fmt: skip
        found = selection(name)(returned)
        assert callable(found) if ":" in name else found == 3
    for name, returned, match in (
        ("pred", {"aux": 1}, r"got 'pred' for a mapping with keys \['aux'\]"),
        ("2", (1, 3), "got '2' for a tuple of length 2"),
        ("pred", SimpleNamespace(aux=1), r"got 'pred' for SimpleNamespace with \['aux'\]"),
    ):
        with pytest.raises(TypeError, match=match):
            selection(name)(returned)
    with pytest.raises(ValueError, match="`output` must name a callable"):
        selection("math:pi")
    with pytest.raises(ValueError, match="`output` must be logits, probabilities, the name or number"):
        selection("")
