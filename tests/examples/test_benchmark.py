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
    assert "by layer, one image, K=6, 2 probes" in printed
    assert ratios["by layer"] > 1
    assert ratios["RelativeStability"] > 0


@pytest.mark.slow
def test_memory_and_epoch(example, capsys):
    benchmark = example("benchmark")
    found = benchmark.main(["test_resnet", "--batch", "1", "--size", "32", "--repeats", "1", "--epoch"])
    printed = capsys.readouterr().out
    assert "peak MiB" in printed
    assert "of an epoch of 50,000 images of 32 px" in printed
    assert 0 < found["epoch"]["monitor"] < 1
