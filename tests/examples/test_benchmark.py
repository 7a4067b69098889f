"""The benchmark at reduced size."""

import pytest

pytest.importorskip("timm")


def test_table(example, capsys):
    benchmark = example("benchmark")
    arguments = ["test_resnet", "--batch", "1", "--size", "32", "--repeats", "1"]
    ratios = benchmark.main([*arguments, "--no-memory", "--layerwise", "2"])["test_resnet"]
    printed = capsys.readouterr().out
    assert ratios["unit: forward, 7 B"] == 1
    assert {"plain forward, B", "forward, affine", "forward vmap, affine", "double_backward, 1 transform"} < set(ratios)
    assert "nine transforms by double backward" in printed
    assert "by layer, one image, K=6, 2 probes" in printed
    assert ratios["by layer"] > 1


@pytest.mark.slow
def test_memory(example, capsys):
    benchmark = example("benchmark")
    benchmark.main(["test_resnet", "--batch", "1", "--size", "32", "--repeats", "1"])
    assert "peak MiB" in capsys.readouterr().out
