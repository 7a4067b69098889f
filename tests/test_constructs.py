"""No row is silent: what users put into models, each measured right against central differences, or refused."""

import functools
import itertools
import warnings

import pytest
import torch
from constructs import ROWS
from torch import nn

import lie_metric as lm
from lie_metric.representations import Image, Invariant

GENERATORS = ("rotation", "translation_x")
TOLERANCE = 1e-6
SEED = 11
# Rows that are more than a composition of torch's own operations and need no further library.
NOT_PLAIN = [name for name, row in ROWS.items() if row.needs is None and not name.startswith("torch: ")]
STEPS = [1e-3 / 4**k for k in range(9)]


def built(row):
    """The callable and the module within it, float64 and in training mode, the same at each call."""
    torch.manual_seed(0)
    made = row.build()
    model, module = made if isinstance(made, tuple) else (made, made)
    if isinstance(module, nn.Module):
        module.double()
    return model, module


def images(row):
    source = torch.Generator().manual_seed(1)
    return torch.randn(row.shape, generator=source, dtype=torch.float64)


def select(returned, output):
    """The tensor that is compared, found without the library."""
    if callable(output):
        return output(returned)
    if isinstance(returned, torch.Tensor):
        return returned
    return returned["out"] if isinstance(returned, dict) and "out" in returned else returned.logits


@functools.cache
def reference(row):
    """Central differences of the function in evaluation mode, with the same draws at each call, where steps agree.

    Returns:
        The derivatives along both tangents, and how far estimates from neighbouring steps are apart, relatively.
    """
    import numpy as np

    model, module = built(row)
    if isinstance(module, nn.Module):
        module.eval()
    x = images(row)
    found, spreads = [], []

    def function(point):
        torch.manual_seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return select(model(point.clone()), row.output).clone()

    for tangent in Image().tangents(x, lm.generators(*GENERATORS), lm.Resampling()):
        slopes = [(function(x + h * tangent) - function(x - h * tangent)) / (2 * h) for h in STEPS]
        # Richardson's extrapolation, of steps that differ by four.
        better = [(16 * narrow - wide) / 15 for wide, narrow in itertools.pairwise(slopes)]
        gaps = [float((a - b).norm()) for a, b in itertools.pairwise(better)]
        best = gaps.index(min(gaps))
        found.append(better[best + 1])
        spreads.append(gaps[best] / float(better[best + 1].norm()))
    return torch.stack(found), max(spreads)


def measured(row, method="auto", gradients=False):
    """What the library says, or the error by which it refuses."""
    import numpy as np

    model, _ = built(row)
    x = images(row)
    torch.manual_seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002
    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = lm.lie_derivative(
                model, x, GENERATORS, output=row.output, output_representation=Invariant(), method=method
            )
        except (RuntimeError, ValueError, TypeError) as error:
            return error
    assert torch.equal(x, images(row)), "the images themselves are changed"
    return torch.stack([found[name] for name in GENERATORS]).detach()


def difference(found, truth):
    """The largest relative difference of a generator."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))


def outcome(row, method="auto", gradients=False):
    """ "right", "refused" or "WRONG", and in what words."""
    found = measured(row, method, gradients)
    if isinstance(found, Exception):
        return "refused", f"{type(found).__name__}: {found}"
    if bool(found.isnan().any()):
        return "refused", "NaN, which nobody takes for a result, although a number would be welcome here"
    truth, spread = reference(row)
    assert spread < TOLERANCE / 4, f"the difference itself is only known to {spread:.0e}"
    error = difference(found, truth)
    return ("right" if error < TOLERANCE else "WRONG"), f"differs by {error:.1e}"


def allowed(row):
    """The outcomes that a row may have."""
    return {"right", "refused"} if row.wanted == "either" else {row.wanted}


@pytest.mark.parametrize("name", ROWS)
def test_right_or_refused(name):
    row = ROWS[name]
    if row.needs:
        pytest.importorskip(row.needs)
    kind, words = outcome(row)
    print(f"{name}: {kind}, {words}")
    assert kind in allowed(row), words
    if kind == "refused":
        assert len(words) > 60, "a refusal says what to do"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["forward", "reverse", "double_backward", "auto with gradients"])
@pytest.mark.parametrize("name", NOT_PLAIN)
def test_no_method_is_silent(name, way):
    """A method that is asked for is right or refuses, and so is what a penalty differentiates."""
    kind, words = outcome(ROWS[name], way.split(" ")[0], way.endswith("gradients"))
    assert kind in {"right", "refused"}, words


@pytest.mark.parametrize("name", [name for name in NOT_PLAIN if ROWS[name].wanted != "either"])
def test_differences_need_no_derivative(name):
    kind, words = outcome(ROWS[name], "difference")
    assert kind == "right", words


if __name__ == "__main__":
    import sys
    import time

    totals: dict[str, int] = {}
    for name, row in ROWS.items():
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        start = time.perf_counter()
        try:
            kind, words = outcome(row)
        except Exception as error:  # a row that does not run is a defect of the table
            kind, words = "BROKEN", f"{type(error).__name__}: {error}"
        mark = " " if kind in allowed(row) else "!"
        totals[mark + kind] = totals.get(mark + kind, 0) + 1
        print(
            f"{mark} {kind:8} {time.perf_counter() - start:5.2f} s  {name:55} {' '.join(words.split())[:110]}",
            flush=True,
        )
    print(totals)
