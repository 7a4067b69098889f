"""Models of points, graphs, molecules and dynamics, each measured right against finite motions, or refused by name."""

import functools
import itertools
import re
import warnings
from collections.abc import Mapping

import pytest
import torch
from geometric import EGNN, ROWS, Forces, Potential, cloud, random
from torch import nn

import lie_metric as lm
from lie_metric.binding import resolve_for
from lie_metric.representations import Invariant, Packed, Points, Vectors

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
    if method == "difference":
        least *= 1e3  # of what differs by rounding alone no difference is better
    assert spread < TOLERANCE / 4, f"the difference itself is only known to {spread:.0e}"
    error = max(float((a - b).norm()) / max(least, float(b.norm())) for a, b in zip(found, truth, strict=True))
    return ("right" if error < TOLERANCE else "WRONG"), f"differs by {error:.1e}"


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "gradients"])
@pytest.mark.parametrize("name", ROWS)
def test_right_or_refused(name, gradients):
    row = ROWS[name]
    if row.needs:
        pytest.importorskip(row.needs)
    wanted = (row.with_gradients if gradients else None) or row.wanted
    kind, words = outcome(row, gradients=gradients)
    if wanted == "right":
        assert kind == "right", words
    else:
        assert kind == "refused", words
        assert re.search(wanted, words), words


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forward", "reverse", "double_backward"])
@pytest.mark.parametrize("name", ROWS)
def test_no_method_is_silent(name, method):
    row = ROWS[name]
    if row.needs:
        pytest.importorskip(row.needs)
    kind, words = outcome(row, method)
    assert kind in {"right", "refused"}, words


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_differences_need_no_derivative(name):
    row = ROWS[name]
    if row.needs:
        pytest.importorskip(row.needs)
    kind, words = outcome(row, "difference")
    assert kind == "right", words


LIBRARIES = ("e3nn: tensor products, gates, harmonics", "e3nn: forces", "torch_geometric: SchNet with forces")


@pytest.mark.parametrize("name", [*LIBRARIES, "graph: E(n) equivariant network"])
def test_what_is_equivariant_is_so_to_rounding(name):
    row = ROWS[name]
    if row.needs:
        pytest.importorskip(row.needs)
    model, inputs = EGNN(field=0.0).double() if name.startswith("graph") else built(row), row.inputs()
    with torch.no_grad():
        found = lm.lie_derivative(
            model, inputs, ("rotation", "translation"), input_representation=row.moves, output_representation=row.gives
        )
        outputs = model(*inputs) if isinstance(inputs, tuple) else None
    size = max(float(one.abs().max()) for one in outputs) if outputs else 100.0
    assert len(found) == 12
    assert max(float(value.abs().max()) for value in found.values()) < 1e-14 * size


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_metric_of_forces(mode):
    # Loaders make their tensors in the mode of the loop that they are in.
    with mode():
        metric = lm.LocalEquivarianceError(
            ("rotation", "scale"), input_representation={"pos": Points(3)},
            output_representation={"energy": Invariant(), "forces": Vectors(3)},
        )  # fmt: skip
        charged = Charged()
        for seed in range(2):
            metric.update(charged, {"pos": random(3, 4, 3, seed=seed).float(), "charge": random(3, 4, seed=9).float()})
        values = metric.compute()
    assert metric.check.status == "agrees"
    assert all(parameter.grad is None for parameter in charged.parameters())
    rotations = [value for name, value in values.items() if "rotation" in name]
    assert len(rotations) == 6
    assert max(rotations) < 1e-5 < 1e-2 < values["forces/scale"]


class Charged(nn.Module):
    """Forces of charges, without a field."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))

    def forward(self, batch):
        pos = batch["pos"].requires_grad_()
        far = (pos - pos.roll(1, 1)).square().sum(-1)
        energy = self.net(torch.stack([far, batch["charge"] * far.sqrt()], -1)).sum((1, 2))
        (gradient,) = torch.autograd.grad(energy.sum(), pos, create_graph=self.training)
        return {"energy": energy, "forces": -gradient}


def test_penalty_of_forces_is_differentiable():
    model, pos = Forces(Potential(width=4)).double(), cloud()

    def penalty():
        found = lm.lie_derivative(
            model, {"pos": pos}, "rotation_z", function=lambda model, batch: model(batch["pos"]),
            input_representation={"pos": Points(3)}, output_representation={"forces": Vectors(3)},
        )  # fmt: skip
        return found["forces/rotation_z"].square().sum()

    weight, h = model.energy.first.weight, 1e-5
    (gradient,) = torch.autograd.grad(penalty(), weight)
    with torch.no_grad():
        weight[1, 0] += h
        ahead = penalty()
        weight[1, 0] -= 2 * h
        behind = penalty()
    torch.testing.assert_close(gradient[1, 0], (ahead - behind) / (2 * h), rtol=1e-6, atol=0)


def test_nan_in_a_later_batch_is_named():
    def energy(pos):
        return (pos[:, :1] - pos[:, 1:]).square().sum(-1).sqrt().sum(1) + pos.sin().sum((1, 2))

    metric = lm.LocalEquivarianceError("rotation_z", input_representation=Points(3))
    pos = cloud()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.update(energy, pos)
    pos[0, 1] = pos[0, 0]
    with pytest.warns(UserWarning, match="NaN or infinite. The first are those of `sqrt`.*no self pairs"):
        metric.update(energy, pos)


def test_outputs_that_are_not_finite_are_told():
    with pytest.warns(UserWarning, match="outputs of the model are not finite.*no self pairs"):
        lm.lie_derivative(
            Forces(lambda pos: (pos - pos).square().sum(-1).sqrt().sum(1)), cloud(), "rotation_z",
            output=lambda returned: returned["forces"],
            input_representation=Points(3), output_representation=Vectors(3),
        )  # fmt: skip


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
