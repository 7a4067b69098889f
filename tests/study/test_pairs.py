"""Pairs of models: the errors of lm.compare, for every two, and what cannot be compared."""

import math
import re
from dataclasses import replace

import pytest
import torch

import lie_metric as lm
from lie_metric.compare import holm
from lie_metric.study import Framing, Settings
from lie_metric.study.data import load_data
from lie_metric.study.measure import measure_model
from lie_metric.study.pairs import deviations, kinds, means_of, pairs, steps
from lie_metric.study.settings import LIE_MEASURES

GENERATORS = ("translation", "rotation", "scale")
NAMES = ["translation_x", "translation_y", "rotation", "scale"]


@pytest.fixture(scope="module")
def records():
    """Of three models over 70 images: groups of one and of two."""
    images = torch.randn(70, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    models = {
        "left": lambda x: x[..., :4].mean((2, 3)),
        "low": lambda x: x[..., 3:, :].square().mean((2, 3)),
        "peak": lambda x: x.flatten(1).logsumexp(1, keepdim=True),
    }
    found = {}
    for name, model in models.items():
        metric = lm.LocalEquivarianceError(GENERATORS, with_noise=True)
        metric.update(model, images)
        found[name] = {record.measure: record for record in metric.records(LIE_MEASURES)}
    return found


def test_pairs_are_those_of_compare(records):
    rows = {(row["measure"], row["generator"], row["a"], row["b"]): row for row in pairs(records)}
    assert len(rows) == 3 * (4 + 1 + 4 + 1 + 4 + 1 + 1)
    for measure in ("relative", "lee", "sensitivity"):
        for a, b in (("left", "low"), ("left", "peak"), ("low", "peak")):
            for wanted in lm.compare(records[a][measure], records[b][measure]):
                row = rows[measure, wanted.name, a, b]
                for key in ("ratio", "low", "high"):
                    assert row[key] == pytest.approx(getattr(wanted, key), rel=1e-9)
                assert row["p"] == pytest.approx(wanted.p, rel=1e-6, abs=1e-12)
        for name in NAMES:
            three = [row for row in rows.values() if (row["measure"], row["generator"]) == (measure, name)]
            assert [row["p_holm"] for row in three] == pytest.approx(holm([row["p"] for row in three]))
    # Paired errors are smaller than independent ones where images are hard for both, and the verdicts see it.
    assert {row["verdict"] for row in rows.values()} > {"a is less"}


def test_geometric_means_and_their_errors(records):
    assert means_of(NAMES, "relative") == {"mean per half side": NAMES[:2]}
    assert means_of([*NAMES, "stretch_x", "mine"], "lee") == {
        "mean per half side": NAMES[:2], "mean per log factor": ["scale", "stretch_x"],
    }  # fmt: skip
    assert means_of(NAMES, "sensitivity") == {"mean per half side": NAMES[:2], "mean of all": NAMES}
    record = records["low"]["sensitivity"]
    found = deviations(record)["mean of all"]
    wanted = record.replicates.map(torch.log)
    mean = lm.functional.sums.Replicates(wanted.value.mean(0), wanted.left_out.mean(1), wanted.images)
    assert found.logarithm == pytest.approx(mean.value.item())
    assert found.error == pytest.approx(mean.standard_error().item())


def test_against_some(records):
    rows = pairs(records, ["peak", "left"])
    assert {(row["a"], row["b"]) for row in rows} == {("left", "peak"), ("low", "peak"), ("low", "left")}
    with pytest.raises(ValueError, match="`against` must name models with Lie derivatives in the study, got 'x'"):
        pairs(records, ["x"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fingerprint": "x"}, "other images"),
        ({"units": ("pixel",) * 4}, "other units"),
        ({"input_shape": (1, 9, 9)}, r"other size of images, \(1, \d, \d\) and \(1, \d, \d\) \(--input-size gives all"),
        ({"settings": {"resampling": "bilinear, zeros, corners"}}, "other stencil"),
    ],
)
def test_what_cannot_be_compared_is_told(records, change, reason):
    changed = dict(records)
    changed["low"] = {
        name: replace(one, **{**change, "settings": {**one.settings, **change.get("settings", {})}})
        for name, one in records["low"].items()
    }
    of, reasons = kinds(changed)
    assert of["left"] == of["peak"] != of["low"]
    rows = pairs(changed)
    apart = [row for row in rows if "low" in {row["a"], row["b"]}]
    assert len(apart) == 2 * 3
    assert all("ratio" not in row and re.search(reason, row["reason"]) for row in apart)
    assert all("reason" not in row for row in rows if row not in apart)
    assert reasons[0][0] == ""


def test_what_a_model_makes_of_a_picture_is_its_own():
    """Normalisations may differ, but where a value depends on them; crops may not, unless all are cut alike."""

    def cut(mean, crop):
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten())
        model.pretrained_cfg = {"input_size": (1, 16, 16), "mean": (mean,), "std": (0.3,), "crop_pct": crop}
        return model

    models = {"one": cut(0.2, 1.0), "two": cut(0.5, 1.0), "crop": cut(0.2, 0.9)}
    images = load_data("digits", 4, 0)

    def told(**options):
        settings = Settings("digits", 4, 4, **{"generators": ("rotation",), "measures": ("relative",)} | options)
        run = {"device": torch.device("cpu"), "batch_size": 4}
        found = {name: measure_model(model, images, settings, **run).records for name, model in models.items()}
        rows = pairs({name: {one.measure: one for one in records} for name, records in found.items()}, ["one"])
        return {row["a"]: row.get("reason", "") for row in rows}

    assert told()["two"] == ""
    assert told()["crop"].startswith("other frame, ")
    assert told()["crop"].endswith("(--input-size gives all models one frame)")
    assert told(framing=Framing((16, 16))) == {"two": "", "crop": ""}
    assert told(generators=("saturation",))["two"].startswith("other normalisation, mean [0.5]")
    assert told(resampling=lm.Resampling(padding="zeros"))["two"].startswith("other normalisation, mean [0.5]")


def test_values_without_logarithm(records):
    record = records["left"]["relative"]
    zero = replace(record, replicates=record.replicates.map(lambda value: value * torch.tensor([0.0, 1, 1, 1])))
    rows = pairs({"zero": {"relative": zero}, "low": {"relative": records["low"]["relative"]}})
    told = {row["generator"]: row["verdict"] for row in rows}
    assert told["translation_x"] == told["mean per half side"] == "undefined"
    assert told["rotation"] != "undefined"


def test_steps():
    assert steps(3, 9)[-1] == pytest.approx(2.2622, abs=1e-4)
    assert steps(3, 9) == sorted(steps(3, 9), reverse=True)
    # The step that a p value just below the corrected level reaches.
    assert all(not math.isnan(one) for one in steps(50, 63))
