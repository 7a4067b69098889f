"""Models of points, graphs, molecules and dynamics, each measured right against finite motions, or refused by name."""

import functools
import itertools
import warnings
from collections.abc import Mapping

import pytest
import torch
from geometric import ROWS
from torch import nn

import lie_metric as lm
from lie_metric.binding import resolve_for
from lie_metric.representations import Packed

TOLERANCE = 1e-6
SEED = 11
STEPS = [1e-3 / 4**k for k in range(9)]


def built(row):
    """The model, float64 and in training mode, the same at each call."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    try:
        model = row.build()
    finally:
        torch.set_default_dtype(dtype)
    return model.double() if isinstance(model, nn.Module) else model


def parts(held, layout):
    """The tensors that a layout names, in its order."""
    if not isinstance(layout, Mapping):
        return [held]
    if isinstance(held, (tuple, list)):
        return [held[int(key)] for key in layout]
    return [held[key] if isinstance(held, Mapping) else getattr(held, key) for key in layout]


def layouts(layout, inputs):
    """The representations of a layout, with the graphs that packed ones name."""
    found = list(layout.values()) if isinstance(layout, Mapping) else [layout]
    return [
        Packed(one.of, inputs["batch"]) if isinstance(one, Packed) and isinstance(one.batch, str) else one
        for one in found
    ]


def moved(inputs, layout, tensors):
    """The inputs with other tensors in the parts that a layout names."""
    if not isinstance(layout, Mapping):
        return tensors[0]
    if isinstance(inputs, tuple):
        held = list(inputs)
        for key, tensor in zip(layout, tensors, strict=True):
            held[int(key)] = tensor
        return tuple(held)
    made = dict(inputs) if isinstance(inputs, dict) else inputs.clone()
    for key, tensor in zip(layout, tensors, strict=True):
        made[key] = tensor
    return made


@functools.cache
def reference(row):
    """Central differences of T(-t) f(T(t) x) in evaluation mode, with the same draws, where steps agree.

    Returns:
        For each generator one vector of all outputs; how far estimates from neighbouring steps are apart, relatively;
        and a size for what is zero, as under what the model is equivariant to.
    """
    model = built(row)
    if isinstance(model, nn.Module):
        model.eval()
    inputs = row.inputs()
    befores, afters = layouts(row.moves, inputs), layouts(row.gives, inputs)

    def function(X, t):
        tensors = [
            one.act(part.clone(), X, t, lm.Resampling())
            for one, part in zip(befores, parts(inputs, row.moves), strict=True)
        ]
        held = moved(inputs, row.moves, tensors)
        torch.manual_seed(SEED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            returned = model(*held) if isinstance(held, tuple) else model(held)
        back = [
            one.act(part.detach(), X, -t, lm.Resampling())
            for one, part in zip(afters, parts(returned, row.gives), strict=True)
        ]
        return torch.cat([part.flatten() for part in back])

    found, spreads = [], []
    generators = resolve_for(row.generators, row.moves)
    least = 1e-3 * max(1.0, float(function(generators[0], 0.0).norm()))
    for X in generators:
        slopes = [(function(X, h) - function(X, -h)) / (2 * h) for h in STEPS]
        # Richardson's extrapolation, of steps that differ by four.
        better = [(16 * narrow - wide) / 15 for wide, narrow in itertools.pairwise(slopes)]
        gaps = [float((a - b).norm()) for a, b in itertools.pairwise(better)]
        best = gaps.index(min(gaps))
        found.append(better[best + 1])
        spreads.append(gaps[best] / max(least, float(better[best + 1].norm())))
    return torch.stack(found), max(spreads), least


def measured(row, method="auto", gradients=False, told=None):
    """What the library says, or the error by which it refuses."""
    model, inputs = built(row), row.inputs()
    before = [part.clone() for part in parts(inputs, row.moves)]
    torch.manual_seed(SEED)
    with torch.set_grad_enabled(gradients), warnings.catch_warnings(record=told is not None) as caught:
        warnings.simplefilter("always" if told is not None else "ignore")
        try:
            found = lm.lie_derivative(
                model, inputs, row.generators, input_representation=row.moves, output_representation=row.gives,
                method=method,
            )  # fmt: skip
        except (RuntimeError, ValueError, TypeError) as error:
            return error
        finally:
            if told is not None:
                told += [str(one.message) for one in caught]
    after = parts(inputs, row.moves)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), "the inputs are changed"
    assert not any(part.requires_grad for part in after), "the inputs require gradients"
    names = [X.name for X in resolve_for(row.generators, row.moves)]
    keys = list(row.gives) if isinstance(row.gives, Mapping) else [""]
    return torch.stack(
        [torch.cat([found[f"{key}/{X}" if key else X].detach().flatten() for key in keys]) for X in names]
    )


def outcome(row, method="auto", gradients=False, told=None):
    """ "right", "refused" or "WRONG", and in what words."""
    found = measured(row, method, gradients, told)
    if isinstance(found, Exception):
        return "refused", f"{type(found).__name__}: {found}"
    if bool(found.isnan().any()):
        return "WRONG", "NaN, which says nothing of its cause"
    truth, spread, least = reference(row)
    assert spread < TOLERANCE / 4, f"the difference itself is only known to {spread:.0e}"
    error = max(float((a - b).norm()) / max(least, float(b.norm())) for a, b in zip(found, truth, strict=True))
    return ("right" if error < TOLERANCE else "WRONG"), f"differs by {error:.1e}"


if __name__ == "__main__":
    import sys
    import time

    for name, row in ROWS.items():
        if sys.argv[2:] and not any(word in name for word in sys.argv[2:]):
            continue
        words = []
        for gradients in (False, True):
            start, told = time.perf_counter(), []
            try:
                words += [*outcome(row, sys.argv[1], gradients, told)]
            except Exception as error:
                words += ["BROKEN", f"{type(error).__name__}: {error}"]
            words += [f"{time.perf_counter() - start:5.2f}", " | ".join(told)]
        print(f"{name:48} {words[0]:8} {words[2]}s {' '.join(words[1].split())[:300]} {{{words[3][:200]}}}")
        print(f"{'':48} {words[4]:8} {words[6]}s {' '.join(words[5].split())[:300]} {{{words[7][:200]}}}", flush=True)
