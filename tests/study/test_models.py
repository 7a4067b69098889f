"""Names of models and what they stand for."""

from pathlib import Path

import pytest
import timm
import torch

from lie_metric.study import ModelSpec, resolve_models

FILE = Path(__file__).parent / "study_models.py"


def names(*given, **options):
    return [spec.name for spec in resolve_models(given, **options)]


def test_timm_names_wildcards_and_families():
    assert names("resnet18", "resnet18.a1_in1k") == ["resnet18", "resnet18.a1_in1k"]
    assert names("resnet18.a?_in1k") == ["resnet18.a1_in1k", "resnet18.a2_in1k", "resnet18.a3_in1k"]
    assert names("skresn*") == names("family:sknet") == ["skresnet18", "skresnet34", "skresnext50_32x4d"]
    assert names("family:sknet", "skresnet18", exclude=["*50*"]) == ["skresnet18", "skresnet34"]
    assert "resnet18" in names("family:resnet")
    # Without weights to load there are more of them.
    assert len(names("family:resnet", pretrained=False)) > len(names("family:resnet"))


def test_hub_names_and_own_models():
    spec = ModelSpec("mine", lambda: None)
    hub = "hf-hub:timm/resnet18.a1_in1k"
    assert names(hub, f"{FILE}:a", "math:sqrt", f"x={FILE}:a", spec) == [hub, f"{FILE}:a", "math:sqrt", "x", "mine"]


def test_build():
    spec = resolve_models(["test_resnet"], pretrained=False)[0]
    model, family, tag = spec.build(10)
    assert (family, tag, model.training) == ("resnet", "random", False)
    _, family, tag = resolve_models([f"{FILE}:b"])[0].build(10)
    assert (family, tag) == ("net1", "own")


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "lightning", "tagged"])
def test_checkpoints(tmp_path, wrap):
    torch.manual_seed(1)
    weights = timm.create_model("test_resnet", num_classes=4).state_dict()
    saved = {
        "bare": weights,
        "state_dict": {"state_dict": weights},
        "lightning": {
            "state_dict": {f"model.{key}": value for key, value in weights.items()} | {"other": torch.ones(1)}
        },
        "tagged": {"model": weights, "tag": "rotation"},
    }[wrap]
    path = tmp_path / "epoch=3.ckpt"
    torch.save(saved, path)
    spec = resolve_models([f"test_resnet@{path}"])[0]
    model, family, tag = spec.build(4)
    assert (spec.name, family) == (f"test_resnet@{path}", "resnet")
    assert tag == ("rotation" if wrap == "tagged" else "epoch=3")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["resnet81"], r"`models` must be names.*got 'resnet81'.*Close to it: .*resnet18"),
        (["resnet18.nothing"], "`models` must have a known tag.*resnet18.a1_in1k"),
        (["nothing*"], "must match a model of timm"),
        (["family:resnett"], "must name a family of timm, got 'family:resnett'.*resnet"),
        (["nowhere.at_all:build"], "must name a callable as module:callable"),
        (["missing.py:build"], "must name a callable as module:callable"),
        ([f"{FILE}:nothing"], "must name a callable as module:callable"),
        ([f"{FILE}:shape"], "must name a callable, got .* which is a tuple"),
        (["resnet18@missing.pt"], "must name a checkpoint that exists"),
        (["x=resnet18", "x=resnet34"], "names of their own, got 'x' for two models"),
        ([], "must be one name or more"),
        ("resnet18", "must be one name or more in a sequence"),
    ],
)
def test_errors(given, match):
    with pytest.raises(ValueError, match=match):
        resolve_models(given)


def test_nothing_left():
    with pytest.raises(ValueError, match="`exclude` must leave a model"):
        resolve_models(["resnet18"], exclude=["*"])
