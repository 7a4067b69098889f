"""Whatever a model returns, a measure is a defined value, or NaN with a reason."""

import gc
import resource
import subprocess
import sys
import warnings

import pytest
import torch
from cases import cnn, images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lie_metric as lm
from lie_metric.lie import linearise
from lie_metric.options import Options

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
    metric = lm.LocalEquivarianceError(("rotation", "saturation"), with_noise=True)
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


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(3 * 16, 5, batch_first=True)

    def forward(self, x):
        return self.layer(x.movedim(2, 1).flatten(2))[0][:, -1]


def of_timm(name, **options):
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=5, **options)


class OverSpread(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return y / (1 + y.std(0))


QUIET = {
    "resnet": (of_timm("resnet10t"), 32),
    "vit": (of_timm("test_vit", img_size=32), 32),
    "swin": (of_timm("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(2, 2), embed_dim=16), 56),
    "channels last inside": (of_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)), 64),
    "pooled, channels last": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(
            memory_format=torch.channels_last
        ),
        16,
    ),
    "recurrent": (Recurrent, 16),
    "spread of the batch": (lambda: OverSpread(nn.Conv2d(3, 5, 3), nn.Flatten()), 8),
    "scripted": (lambda: torch.jit.trace(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten()), torch.rand(1, 3, 8, 8)), 8),
}


@pytest.mark.parametrize("kind", QUIET)
def test_torch_warns_of_nothing_that_is_our_doing(kind):
    make, size = QUIET[kind]
    model, x = make().eval(), images(2, size).float().contiguous(memory_format=torch.channels_last)
    for _ in range(2):  # what torch says of the model itself, once, is not ours
        model(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metric = lm.LocalEquivarianceError("rotation")
        for _ in range(2):
            metric.update(model, x)
        metric.measures()
        for method in ("forward vmap", "forward loop", *(["reverse"] if kind != "spread of the batch" else [])):
            with torch.no_grad():
                linearise(model, x, lm.generators("rotation"), Options(method=method))
        if kind != "recurrent":
            lm.lie_derivative(model, x, "rotation")["rotation"].square().sum().backward()
        if kind not in {"recurrent", "spread of the batch"}:  # alone, an image has no spread
            lm.layerwise_equivariance_error(model, x, "rotation", probes=1)
    told = [f"{entry.category.__name__}: {entry.message}" for entry in caught]
    assert not [message for message in told if "Shares of 2 images" not in message]


@pytest.mark.slow
def test_a_first_measurement_imports_without_a_word():
    """What torch imports with the first forward-mode derivative scripts functions: a deprecation, in a new process."""
    program = """
import torch, lie_metric as lm, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    lm.lie_derivative(lambda x: x.sigmoid().mean((2, 3)), torch.rand(2, 3, 8, 8), "rotation")
assert not caught, [str(entry.message) for entry in caught]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


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
