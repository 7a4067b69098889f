"""The comparison of measures at reduced size."""

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_table(example, tmp_path, capsys, monkeypatch):
    which = example("which_measure")
    few = which.digits()[0][:100]
    monkeypatch.setattr(which, "digits", lambda: (Set(few), Set(few), 1, 10))
    monkeypatch.setattr(which, "points", lambda count, reach, seed: tuple(part[:count] for part in few))
    results = which.main(["--epochs", "1", "--num-images", "16", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert set(results) == {"points", "digits"}
    truth = results["digits"]["truth: two whole pixels"]
    assert truth[-1] < 1e-5
    assert min(truth[:-1]) > 0.05
    assert f"{which.right(results['digits']['relative'], truth)} of 10" in printed
    assert (tmp_path / "curves.png").stat().st_size > 10_000


class Set:
    def __init__(self, tensors):
        self.tensors = tensors


def test_pairs(example):
    right = example("which_measure").right
    assert right([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == 3
    assert right([3.0, 2.0, 2.0], [10.0, 20.0, 30.0]) == 0


def test_points_keep_away_from_the_frame(example):
    images, labels = example("which_measure").points(300, 4.0, 0)
    assert images.shape == (300, 1, 32, 32)
    assert images[:, :, [0, 1, -2, -1]].max() < 1e-3
    assert labels.bincount().tolist() == [100, 100, 100]
