"""Lies planted into the engine: the check against the function itself finds each, and nothing of them is reported.

Each lie first shows that it changes what an unchecked measurement says, then is met by the check: another method has to
give the true derivative, or the measurement is refused.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lie_metric as lm
from lie_metric.jacobian import carrying, methods
from lie_metric.jacobian.carrying import RULES, Dual, wrap
from lie_metric.lie import linearise
from lie_metric.options import Options
from lie_metric.representations import Invariant

GENERATORS = ("rotation", "translation_x", "scale")


class Network(nn.Module):
    """Convolution, batch norm, attention, a residual, changes in place, dropout that is always on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.norm.running_var.uniform_(0.5, 2)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        y = F.gelu(self.norm(self.stem(x))) + F.max_pool2d(self.stem(x), 3, 1, 1)
        y += self.stem(x).sin()
        t = y.flatten(2).mT
        t = t + self.mix(t).mul_(0.5)
        t = t + torch.softmax(t @ t.mT, -1) @ t + F.scaled_dot_product_attention(2 * t, t, t)
        return self.head(F.layer_norm(t, (4,)).cumsum(1).mean(1)).log_softmax(1)


def images(dtype):
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)


def truth(model, dtype):
    """Central differences in float64, written without the library."""
    x = images(dtype).double()
    double = type(model)().double().eval()
    found = []
    for tangent in lm.representations.Image().tangents(x, lm.generators(*GENERATORS), lm.Resampling()):
        h = 1e-5
        wide, narrow = ((double(x + s * tangent) - double(x - s * tangent)) / (2 * s) for s in (h, h / 2))
        found.append((4 * narrow - wide) / 3)
    return torch.stack(found).detach()


def measured(model, dtype, method, verify, chunk_size=None):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = linearise(
            model,
            images(dtype),
            lm.generators(*GENERATORS),
            Options(output_representation=Invariant(), method=method, chunk_size=chunk_size),
            verify=verify,
        )
    return result.lie_derivatives.double(), result.method


# Lies by operation: what is said of the tangents of its result, given the arguments.


def _rule(name, lie):
    def plant(monkeypatch):
        rule = RULES.get(name, carrying.any_operation)

        def lying(func, args, kwargs):
            result = rule(func, args, kwargs)
            if result is NotImplemented:
                result = carrying.any_operation(func, args, kwargs)
            first = result[0] if isinstance(result, tuple) else result
            if not isinstance(first, Dual):
                return result
            told = wrap(first.value.clone(), lie(first.tangents.clone(), args))
            return (told, *result[1:]) if isinstance(result, tuple) else told

        monkeypatch.setitem(RULES, name, lying)
        monkeypatch.delitem(carrying.IN_PLACE, name, raising=False)
        # The operations that were met before have their rules already.
        monkeypatch.setattr(carrying, "_TABLE", {})

    return plant


def _one_sign(tangents, args):
    tangents[1] *= -1
    return tangents


def _lost_branch(tangents, args):
    both = len(args) > 1 and isinstance(args[0], Dual) and isinstance(args[1], Dual)
    return args[0].tangents.expand_as(tangents).clone() if both else tangents


def _wrong_axis(tangents, args):
    weights = args[0].value.softmax(-2)
    change = args[0].tangents
    return weights * (change - (weights * change).sum(-2, keepdim=True))


def _second_image(tangents, args):
    return torch.cat([tangents[:, :1], 1.1 * tangents[:, 1:]], 1)


def _old_filters(tangents, args):
    if not isinstance(args[0], Dual):
        return tangents
    filters = args[1].roll(1, 0)
    moved = args[0].tangents
    return torch.stack([F.conv2d(t, filters, None, args[3], args[4], args[5], args[8]) for t in moved])


def _norm_without_weight(tangents, args):
    scales = len(args) > 1 and isinstance(args[1], torch.Tensor) and args[1].shape == (1, 4, 1, 1)
    return args[0].tangents.clone() if scales else tangents


def _draws_again(tangents, args):
    return tangents * (torch.rand_like(tangents[0]) > 0.5)


def _cut_short(tangents, args):
    tangents[:, :, 30:] = 0
    return tangents


def _method(name, lie):
    def plant(monkeypatch):
        told = methods.METHODS[name]

        def lying(function, inputs, tangents, chunk):
            value, products = told(function, inputs, tangents, chunk)
            return value, lie(products.clone())

        monkeypatch.setitem(methods.METHODS, name, lying)

    return plant


def _last_row_lost(products):
    products[-1:] = products[:1]
    return products


LIES = {
    "a factor of a pointwise function": _rule("gelu", lambda t, args: 1.5 * t),
    "a factor close to one": _rule("gelu", lambda t, args: 1.01 * t),
    "a lost branch": _rule("add", _lost_branch),
    "the sign for one generator": _rule("_softmax", _one_sign),
    "softmax along another axis": _rule("_softmax", _wrong_axis),
    "log_softmax without its mean": _rule("_log_softmax", lambda t, args: args[0].tangents.clone()),
    "filters of earlier weights": _rule("convolution", _old_filters),
    "batch norm without its weight": _rule("mul", _norm_without_weight),
    "another draw": _rule("sin", _draws_again),
    "the second image alone": _rule("sin", _second_image),
    "the first tangent for all": _rule("sin", lambda t, args: t[:1].expand_as(t).clone()),
    "a sum that does not reach its end": _rule("cumsum", _cut_short),
    "pooling at the wrong place": _rule("max_pool2d_with_indices", lambda t, args: t.roll(1, -1)),
    "zeros": _method("forward", torch.zeros_like),
    "images mixed": _method("forward", lambda p: p.flip(1)),
    "the last generator is the first": _method("forward", _last_row_lost),
    "half": _method("forward", lambda p: 0.5 * p),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_found(name, dtype, monkeypatch):
    model = Network().to(dtype)
    true = truth(model, dtype)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-3
    honest, method = measured(model, dtype, "auto", True)
    assert method == "forward"
    assert (honest - true).norm() <= tolerance * true.norm()
    LIES[name](monkeypatch)
    told, method = measured(model, dtype, "forward", False)
    assert method == "forward"
    assert (told - true).norm() > 1e-3 * true.norm(), "this lie would change nothing"
    for asked in ("auto", "forward"):
        try:
            found, method = measured(model, dtype, asked, True)
        except RuntimeError:
            continue  # refused
        assert method != "forward"
        assert (found - true).norm() <= tolerance * true.norm()


def test_reverse_mode_that_mixes_images_is_found(monkeypatch):
    _method("reverse", lambda p: p.flip(1))(monkeypatch)
    model = Network().double()
    with pytest.raises(RuntimeError, match="reverse"):
        measured(model, torch.float64, "reverse", True)
    found, _ = measured(model, torch.float64, "auto", True)
    true = truth(model, torch.float64)
    assert (found - true).norm() <= 1e-6 * true.norm()


def test_parts_that_repeat_the_first_are_found(monkeypatch):
    told = methods.METHODS["forward"]

    def lying(function, inputs, tangents, chunk):
        value, products = told(function, inputs, tangents, chunk)
        return value, torch.cat([products[:chunk]] * (-(-len(tangents) // chunk)))[: len(tangents)]

    monkeypatch.setitem(methods.METHODS, "forward", lying)
    model = Network().double()
    found, method = measured(model, torch.float64, "auto", True, chunk_size=2)
    true = truth(model, torch.float64)
    assert method != "forward"
    assert (found - true).norm() <= 1e-6 * true.norm()


class _Wrong(torch.autograd.Function):
    """Computed where tangents cannot follow; its derivative is off by one percent."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx, g):
        return 2.02 * ctx.saved_tensors[0] * g


class _Declaring(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.stem(x) + _Wrong.apply(self.stem(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_declared_derivative_that_is_off_by_one_percent_is_found(dtype):
    with pytest.raises(RuntimeError, match="difference"):
        measured(_Declaring().to(dtype), dtype, "auto", True)
