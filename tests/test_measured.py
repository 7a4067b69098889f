"""What is measured: functions of models, selected outputs, how they are said to transform, and what is refused."""

import dataclasses
import functools
import re
import warnings

import pytest
import torch
from cases import cnn, images
from torch import nn

import lie_metric as lm
from lie_metric import functional as F
from lie_metric import representations as R
from lie_metric import testing
from lie_metric.calling import select_output
from lie_metric.measured import described, evaluated, function_of
from lie_metric.options import Options


class Conditioned(nn.Module):
    """Takes more than images, and has methods of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 3, 3)
        self.head = nn.Linear(3, 5)
        self.tied = self.head

    def encode(self, x):
        return self.stem(x).tanh().mean((2, 3))

    def forward(self, x, *, t):
        return self.tied(self.encode(x)) * t


def doubled(model, x):
    return model(x, t=2.0)


MEASURES = {
    "lie_derivative": lambda model, x, **o: lm.lie_derivative(model, x, "rotation", **o),
    "relative": lambda model, x, **o: F.relative(model, x, "rotation", **o),
    "gram": lambda model, x, **o: {"gram": F.gram(model, x, "rotation", **o)},
    "principal": lambda model, x, **o: {"p": F.principal_directions(model, x, ("rotation", "scale"), **o)[0]},
    "penalty": lambda model, x, **o: {"p": F.equivariance_penalty(model, x, "rotation", normalise="none", **o)},
    "finite": lambda model, x, **o: F.relaxed_equivariance_error(model, x, **o),
    "eq_t": lambda model, x, **o: {"eq_t": F.eq_t(model, x, **o)},
    "stability": lambda model, x, **o: {"d": F.relative_stability(model, x, **o)["relative_stability"]},
    "violation": lambda model, x, **o: testing.equivariance_violation(model, x, "rotation", **o),
    "lattice": lambda model, x, **o: testing.lattice_violation(model, x, "flips", **o),
    "local": lambda model, x, **o: lm.LocalEquivarianceError("rotation", **o)(model, x),
    "companion": lambda model, x, **o: lm.RelaxedEquivarianceError(**o)(model, x),
    "band": lambda model, x, **o: lm.BandLimitedEquivariance(kinds=("eq_t",), **o)(model, x),
    "stability metric": lambda model, x, **o: lm.RelativeStability(**o)(model, x),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_functions_of_a_model_everywhere(measure):
    """A method by name and a callable are what a wrapper made by hand is; without, the message says what to do."""
    model, x = Conditioned().double(), images(4)
    torch.testing.assert_close(measure(model, x, function="encode"), measure(model.encode, x))
    torch.testing.assert_close(measure(model, x, function=doubled), measure(functools.partial(model, t=2.0), x))
    with pytest.raises(TypeError, match=r"got Conditioned\(x, \*, t\).*`function=lambda model, images"):
        measure(model, x)
    with pytest.raises(ValueError, match=r"`function` must name a method of Conditioned, got 'encod'.*'encode'"):
        measure(model, x, function="encod")
    with pytest.raises(TypeError, match="`function` must be the name of a method, a callable or None, got 3"):
        measure(model, x, function=3)


def test_a_model_that_is_no_callable():
    class Encoder:
        def encode(self, x):
            return x.mean((2, 3))

    class NoForward(nn.Module):
        def encode(self, x):
            return x.mean((2, 3))

    wanted = F.lee(lambda x: x.mean((2, 3)), images(), "scale")
    for model in (Encoder(), NoForward()):
        assert F.lee(model, images(), "scale", function="encode") == wanted
    with pytest.raises(TypeError, match=r"`model` must be callable, got Encoder.*`function='encode'`"):
        F.lee(Encoder(), images(), "scale")
    with pytest.raises(TypeError, match="`model` must have a `forward`, got NoForward"):
        F.lee(NoForward(), images(), "scale")
    hooked = Conditioned().double()
    hooked.register_forward_pre_hook(lambda _, args, kwargs: (args, {"t": 2.0}), with_kwargs=True)
    assert F.lee(hooked, images(), "scale") == F.lee(hooked, images(), "scale", function=doubled)


@pytest.mark.parametrize("function", ["encode", doubled], ids=["method", "callable"])
@pytest.mark.parametrize("frozen", [False, True])
def test_half_precision_and_constant_weights_whatever_is_called(function, frozen):
    model = Conditioned().bfloat16()
    model.register_buffer("running", torch.ones(2, dtype=torch.bfloat16))
    x = images(2).float()
    kept = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    f = function_of(model, "logits", function, frozen)(x)
    assert f.dtype == torch.float32
    assert f.requires_grad != frozen
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor is kept[name]
    assert model.tied is model.head
    raised = function_of(model, "logits", function, dtype=torch.float64)(x.double())
    assert raised.dtype == torch.float64
    torch.testing.assert_close(raised.float(), f, rtol=1e-5, atol=1e-6)
    wanted = function_of(Conditioned().to(torch.bfloat16).double(), "logits", function)(x.double())
    torch.testing.assert_close(raised, wanted, rtol=1e-12, atol=0)
    if not frozen:
        assert function_of(model, "logits", function)(x).requires_grad
        f.sum().backward()
        assert model.stem.weight.grad.dtype == torch.bfloat16


def test_weights_are_put_back_after_an_error():
    model = Conditioned().half()
    before = list(model.parameters())

    def broken(model, x):
        assert model.stem.weight.dtype == torch.float32
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        function_of(model, "logits", broken)(images())
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*script:")
def test_scripted_models_and_bound_methods_are_raised_too():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten()).half()
    x = images(2).float()
    wanted = function_of(plain, "logits")(x)
    torch.testing.assert_close(function_of(torch.jit.script(plain), "logits")(x), wanted)
    model = Conditioned().half()
    assert function_of(model.encode, "logits")(x).dtype == torch.float32
    recurrent = nn.LSTM(8, 4, batch_first=True).bfloat16()
    assert function_of(recurrent, "logits")(torch.rand(2, 3, 8)).dtype == torch.float32


def test_functions_that_do_not_say_what_they_take():
    """As those of torch itself do not."""
    torch.testing.assert_close(F.lee(torch.sin, images(), "scale"), F.lee(lambda x: x.sin(), images(), "scale"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_images_that_are_no_real_numbers_are_refused(dtype):
    with pytest.raises(TypeError, match=f"`inputs` must have a floating-point dtype, got {dtype}. Convert and scale"):
        F.lee(torch.sin, torch.ones(2, 3, 8, 8, dtype=dtype), "scale")


@pytest.mark.parametrize("entry", [torch.nan, torch.inf, -torch.inf])
def test_images_that_are_not_finite_are_refused(entry):
    x = images()
    x[1, 2, 3, 4] = entry
    with pytest.raises(ValueError, match="`inputs` must be finite"):
        F.lee(torch.sin, x, "scale")


def test_a_number_is_no_batch_of_images():
    with pytest.raises(ValueError, match=r"`inputs` must be .*got shape \(\)"):
        lm.lie_derivative(torch.sin, torch.ones(()), "scale")


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (lambda x, t: x, "model(images, t=...)"),
        (lambda x, t, *rest, steps=3, **further: x, "model(images, t=...)"),
        (lambda x, *, t, scale: x, "model(images, t=..., scale=...)"),
    ],
)
def test_arguments_that_are_missing_are_named(model, call):
    with pytest.raises(TypeError, match=re.escape(f"e.g. `function=lambda model, images: {call}`")):
        F.lee(model, images(), "scale")


class Returned:
    def __init__(self, **parts):
        vars(self).update(parts)


@dataclasses.dataclass(slots=True)
class Found:
    count: int
    scores: torch.Tensor


@pytest.mark.parametrize(
    ("returned", "match"),
    [
        (
            {"last_hidden_state": torch.ones(2, 3)},
            r"keys \['last_hidden_state'\].*`output=lambda returned: returned\['last_hidden_state'\]`",
        ),
        ({"n": 3, "scores": torch.ones(2)}, r"keys \['n', 'scores'\].*returned\['scores'\]"),
        (Returned(pooled=torch.ones(2)), r"Returned with attributes \['pooled'\].*returned\.pooled"),
        (Found(3, torch.ones(2)), r"Found with attributes \['count', 'scores'\].*returned\.scores"),
        ((3, torch.ones(2)), r"a tuple of length 2.*returned\[1\]"),
        ({}, r"got dict\. Pass a callable that returns one"),
        (None, "got NoneType. Pass a callable that returns one"),
    ],
)
def test_outputs_without_a_known_tensor_say_what_there_is(returned, match):
    with pytest.raises(TypeError, match=match):
        select_output(returned, "logits")


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (2, 8, 9, 1), (2, 6, 6, 4)])
def test_channels_last_inputs_are_refused_until_they_are_declared(shape):
    x = torch.rand(shape)
    with pytest.raises(ValueError, match=r"looks like \(B, H, W, C\). Pass `input_representation=.*ChannelsLast\(\)`"):
        lm.lie_derivative(lambda v: v.flatten(1), x, "rotation")
    for declared in (R.ChannelsLast(), R.Image()):
        lm.lie_derivative(lambda v: v.flatten(1), x, "rotation", input_representation=declared)


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 4), (2, 16, 4, 4), (2, 1, 28, 28), (2, 64, 1, 1), (2, 3, 9, 3), (2, 8, 2, 3)]
)
def test_channels_first_inputs_are_not(shape):
    lm.lie_derivative(lambda v: v.flatten(1), torch.rand(shape), "scale")


def test_two_channels_may_be_vectors():
    two, x = nn.Conv2d(3, 2, 3, padding=1).double(), images()
    with pytest.raises(ValueError, match=r"two scalars.*or the two components of vectors.*`lie_metric.rep.*Image\(\)`"):
        lm.lie_derivative(two, x, "rotation")
    lm.lie_derivative(two, x, "rotation", output_representation=R.Image())
    lm.lie_derivative(two, x, "rotation", output=lambda field: field.norm(dim=1, keepdim=True))
    lm.lie_derivative(lambda v: v.sin(), x[:, :2], "rotation")  # two channels in, two out
    with pytest.raises(ValueError, match="of 3 channels"):
        lm.lie_derivative(
            lambda v: two(v.movedim(-1, 1)), x.movedim(1, -1), "rotation", input_representation=R.ChannelsLast()
        )


def test_the_output_of_channels_last_inputs_is_compared_with_their_size():
    wide = torch.rand(2, 8, 12, 3)
    found = lm.LocalEquivarianceError("scale", input_representation=R.ChannelsLast())
    found.update(lambda v: v.movedim(-1, 1), wide)
    assert found.described == "(B, 3, 8, 12): image, in the proportions of the input"
    _, representation = evaluated(
        None, lambda v: v.movedim(-1, 1), wide, Options(input_representation=R.ChannelsLast())
    )
    assert isinstance(representation, R.Image)


@pytest.mark.parametrize("width", [2, 4, 6, 8])
def test_what_may_be_coordinates_is_announced_once_for_each_model(width):
    def points(v):
        return v.flatten(1)[:, :width]

    def others(v):
        return v.flatten(1)[:, :width]

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            F.lee(points, images(), "scale")
        F.lee(others, images(), "scale")
        F.lee(points, images(), "scale", output_representation=R.Invariant())
    told = [one for one in seen if "taken as invariant" in str(one.message)]
    assert len(told) == 2
    assert f"points of shape (B, {width})" in str(told[0].message)
    assert "others of shape" in str(told[1].message)
    assert all(one.filename == __file__ for one in told)  # the line of the caller
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.lee(lambda v: v.flatten(1)[:, : width + 1], images(), "scale")
        F.lee(lambda v: v.flatten(1)[:, width], images(), "scale")


@pytest.mark.parametrize(("dimension", "doubtful"), [(2, {4}), (3, {6, 9})])
def test_what_may_be_several_vectors_of_points_is_announced(dimension, doubtful):
    points = torch.rand(2, 6, dimension)
    for width in {*range(1, 11)} - {dimension}:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            F.lee(
                lambda v, width=width: v.flatten(1)[:, :width],
                points,
                "rotation",
                input_representation=R.Points(dimension),
            )
        told = [str(one.message) for one in seen if "taken as invariant" in str(one.message)]
        assert len(told) == (width in doubtful)
        for message in told:
            assert "they move with the points" in message
            advice = re.search("`output_representation=lie_metric.representations.(DirectSum.*?)`", message).group(1)
            kind = eval(advice, {"DirectSum": R.DirectSum, "lie_metric": lm})  # what is advised can be typed in
            kind.check(torch.rand(2, width), "output")


@pytest.mark.parametrize(
    ("shape", "representation", "declared", "output", "wanted"),
    [
        ((3, 10), R.Invariant(), None, "logits", "(B, 10): invariant, class scores"),
        ((3, 10), R.Invariant(), None, "probabilities", "(B, 10): invariant, class probabilities"),
        ((3, 10), R.Invariant(), R.Invariant(), "logits", "(B, 10): invariant, as declared"),
        ((3,), R.Invariant(), None, "logits", "(B,): invariant, one number for each image"),
        ((3, 4, 8, 8), R.Image(), None, "logits", "(B, 4, 8, 8): image, in the proportions of the input"),
        ((3, 8, 8, 4), R.ChannelsLast(), R.ChannelsLast(), "logits", "(B, 8, 8, 4): image with channels last, as decl"),
        (
            (3, 5, 8),
            R.Tokens((2, 2), 1),
            None,
            "logits",
            "(B, 5, 8): Tokens(grid_size=(2, 2), prefix=1, spacing=()), the grid that",
        ),
    ],
)
def test_descriptions(shape, representation, declared, output, wanted):
    assert described(torch.zeros(shape), representation, declared, output).startswith(wanted)


def test_empty_inputs_and_outputs():
    for measure in (F.lee, F.relaxed_equivariance_error, F.relative_stability, F.eq_t):
        with pytest.raises(
            ValueError, match=r"`inputs` must be non-empty, got shape \(0, 3, 16, 16\): there is no image"
        ):
            measure(cnn(), images()[:0])
        with pytest.raises(ValueError, match=r"`output` must be non-empty, got shape \(3, 0\) from 3 images"):
            measure(lambda v: v.flatten(1)[:, :0], images())


def test_a_penalty_has_no_differences():
    with pytest.raises(ValueError, match="`method` must not be 'difference' for a penalty"):
        lm.equivariance_penalty(cnn(), images(), method="difference")
    lm.LocalEquivarianceError(method="difference")


def untrained(x):
    return (x.mean((2, 3)) - 0.5) * torch.zeros(3)


AT_REST = {
    "weights of zero": untrained,
    "a constant": lambda x: torch.ones(len(x), 3),
    "quantised": lambda x: (x.mean((2, 3)) / 8).round(),
    "picked": lambda x: nn.functional.one_hot(x.mean((2, 3)).argmax(1), 3).float(),
}


def rests(kind, measure):
    """How often a measurement of a new model says that its output does not move."""
    model = nn.Sequential()
    model.forward = AT_REST[kind]
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measure(model, x)
        measure(model, x)
    told = [entry for entry in caught if "does not move: its derivative is exactly zero" in str(entry.message)]
    assert {entry.filename for entry in told} <= {__file__}
    return len(told)


@pytest.mark.parametrize("kind", AT_REST)
def test_an_output_at_rest_is_told_once_for_each_model(kind):
    def by_metric(model, x):
        metric = lm.LocalEquivarianceError("rotation")
        for _ in range(2):
            metric.update(model, x)

    for measure in (
        lm.lie_derivative,
        torch.no_grad()(lm.lie_derivative),
        by_metric,
        functools.partial(lm.lie_derivative, method="difference"),
    ):
        with torch.no_grad():
            assert rests(kind, measure) == 1
    assert rests(kind, lambda *each: lm.equivariance_penalty(*each, normalise="none")) == 1


def test_a_model_that_cannot_be_remembered_is_told_each_time():
    class Rests:
        __slots__ = ()

        def __call__(self, x):
            return untrained(x)

    model, x = Rests(), torch.rand(2, 3, 8, 8)
    for _ in range(2):
        with pytest.warns(UserWarning, match="Rests does not move: its derivative is exactly zero"):
            lm.lie_derivative(model, x)


def test_symmetry_and_images_at_rest_are_not_told():
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("fourier", "bspline"):
            periodic = lm.Resampling(kind, padding="circular")
            lm.lie_derivative(lambda v: v.mean((2, 3)), x, "translation", resampling=periodic)
        lm.lie_derivative(lambda v: v.mean((2, 3)), torch.zeros(2, 3, 8, 8), "rotation")
        lm.lie_derivative(nn.Conv2d(3, 5, 3), x, "rotation", output=lambda s: s[:, :, 0, 0])
