"""The benchmark at reduced size."""

import pytest

pytest.importorskip("timm")


def test_table(example, capsys):
    benchmark = example("benchmark")
    arguments = ["test_resnet", "--batch", "1", "--size", "32", "--repeats", "1"]
    ratios = benchmark.main([*arguments, "--no-memory", "--layerwise", "2", "--companions"])["test_resnet"]
    printed = capsys.readouterr().out
    assert ratios["unit: forward, 7 B"] == 1
    assert {"plain forward, B", "default, affine", "forward, affine", "forward vmap, affine"} < set(ratios)
    assert "nine transforms by double backward" in printed
    assert "by layer, 9 generators (K=6), shares, and squared norms by 2 probes: " in printed
    assert "by layer" in ratios
    assert ratios["RelativeStability"] > 0


def test_geometry(example, capsys):
    found = example("benchmark").main(["--geometry", "--size", "32", "--repeats", "1"])
    assert len(found) == 2
    for costs in found.values():
        assert costs["plain forward"] == 1
        assert costs["difference"] > costs["auto"] > 1
    assert "3-D U-Net" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_and_epoch(example, capsys, monkeypatch):
    benchmark, measured = example("benchmark"), {}
    real = benchmark.peak_memory

    def of_two(arguments, name, label):
        """Each pass would take a process of its own: two of them stand for all."""
        if label in {"plain forward, B", "default, affine"}:
            measured[label] = real(arguments, name, label)
        return measured.get(label, 0.0)

    monkeypatch.setattr(benchmark, "peak_memory", of_two)
    found = benchmark.main(["test_resnet", "--batch", "1", "--size", "32", "--repeats", "1", "--epoch"])
    printed = capsys.readouterr().out
    assert "peak MiB" in printed
    assert measured["default, affine"] > measured["plain forward, B"] > 0
    assert "Of an epoch of 50,000 images of 32 px" in printed
    assert "EquivarianceMonitor(floor=False, displacement=None): " in printed
    assert "EquivarianceMonitor(), an epoch without them: " in printed
    assert 0 < found["epoch"]["monitor"] < 1
