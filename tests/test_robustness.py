"""Whatever a model returns, a measure is a defined value, or NaN with a reason."""

import gc
import resource
import warnings

import pytest
import torch
from cases import cnn, images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lie_metric as lm

SCALES = st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e30])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    SCALES,
    st.sampled_from(["plain", "constant", "nan", "inf", "zero"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_value_or_nan_with_a_reason(count, classes, scale, kind, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, classes)).to(dtype)
    with torch.no_grad():
        model[1].weight.mul_({"constant": 0, "zero": 0}.get(kind, scale))
        model[1].bias.fill_({"nan": torch.nan, "inf": torch.inf, "constant": scale, "zero": 0}.get(kind, 0.0))
    metric = lm.LocalEquivarianceError(("rotation", "saturation"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metric.update(model, images(count, 8).to(dtype))
        measures = {name: getattr(metric, name)() for name in ("relative", "lee", "sensitivity")}
    told = " ".join(str(entry.message) for entry in caught)
    for name, values in measures.items():
        for value in values.values():
            assert value.isfinite() or (value.isnan() and f"`{name}` is NaN" in told)
    if kind in {"nan", "inf"}:
        assert all(value.isnan() for values in measures.values() for value in values.values())
    if kind == "plain" and dtype == torch.float64:
        # Neither does a small output count as none, nor a large one as infinite.
        assert measures["sensitivity"]["rotation"] > 0
        assert measures["relative"]["rotation"].isnan() == (count == 1)
    if kind in {"constant", "zero"}:
        assert measures["relative"]["rotation"].isnan()
        assert measures["lee"]["rotation"] == 0


@settings(max_examples=15, deadline=None)
@given(SCALES)
def test_relative_and_sensitivity_do_not_depend_on_the_scale_of_the_output(scale):
    model, x = cnn().eval(), images(5)
    for name in ("relative", "sensitivity"):
        plain = getattr(lm.functional, name)(model, x, "rotation")["rotation"]
        scaled = getattr(lm.functional, name)(lambda v: scale * model(v), x, "rotation")["rotation"]
        assert scaled.item() == pytest.approx(plain.item(), rel=1e-9)


@pytest.mark.slow
def test_memory_stays_flat():
    model, x = cnn(), images(4)
    metric = lm.LocalEquivarianceError("affine")

    def peak():
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    for _ in range(50):
        metric.update(model, x)
    before = peak()
    for _ in range(400):
        metric.update(model, x)
    lm.layerwise_equivariance_error(model, x, "rotation", probes=1)
    middle = peak()
    for _ in range(50):
        lm.layerwise_equivariance_error(model, x, "rotation", probes=1)
    assert middle - before < 16
    assert peak() - middle < 16
