"""Every option of a measurement at a wrong kind and a wrong value, and what each of them changes."""

import warnings

import pytest
import torch

import lie_metric as lm
from lie_metric import representations as R
from lie_metric.calling import select_output
from lie_metric.lie import linearise
from lie_metric.measured import described, evaluated
from lie_metric.options import Options

GOOD = {
    "output": "logits",
    "input_representation": None,
    "output_representation": None,
    "resampling": None,
    "method": "auto",
    "chunk_size": None,
    "function": None,
}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("output", "scores", ValueError),
        ("output", None, ValueError),
        ("function", 3, TypeError),
        ("function", "", TypeError),
        ("input_representation", R.Image, TypeError),
        ("input_representation", "image", TypeError),
        ("output_representation", R.Invariant, TypeError),
        ("output_representation", 3, TypeError),
        ("resampling", "bspline", TypeError),
        ("resampling", lm.Resampling, TypeError),
        ("method", "backward", ValueError),
        ("chunk_size", True, TypeError),
        ("chunk_size", 2.0, TypeError),
        ("chunk_size", 0, ValueError),
        ("chunk_size", -1, ValueError),
    ],
)
def test_wrong_options(name, value, error):
    Options(**GOOD)
    with pytest.raises(error, match=f"`{name}` must"):
        Options(**GOOD | {name: value})


@pytest.mark.parametrize("name", ["input_representation", "output_representation"])
@pytest.mark.parametrize("key", ["", "a/b", 3])
def test_parts_have_names_that_can_be_told(name, key):
    with pytest.raises(ValueError, match=f"`{name}` must have names without '/', .*got \\[{key!r}\\]"):
        Options(**GOOD | {name: {"a": R.Image(), key: R.Image()}})
    with pytest.raises(TypeError, match=f"`{name}\\['b'\\]` must be a representation, got 3"):
        Options(**GOOD | {name: {"a": R.Image(), "b": 3}})


def test_options_that_a_measure_has_not():
    with pytest.raises(TypeError, match=r"among \['chunk_size', .*'seed'\], got \['method', 'sede'\]"):
        Options.of({"method": "auto", "sede": 1, "output": "logits"}, without=("method",), beside=("seed",))
    named = Options(output_representation={"forces": R.Vectors(3), "energy": R.Invariant()})
    with pytest.raises(TypeError, match=r"got the parts \['forces', 'energy'\].*returned\['forces'\]"):
        _ = named.whole_output


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output", "probabilities"),
        ("output", len),
        ("function", "encode"),
        ("function", len),
        ("input_representation", R.ChannelsLast()),
        ("output_representation", R.Invariant()),
        ("resampling", lm.Resampling("cubic")),
        ("chunk_size", 1),
        *[("method", method) for method in ("forward", "forward vmap", "reverse", "double_backward", "difference")],
    ],
)
def test_right_options(name, value):
    Options(**GOOD | {name: value})


def test_what_is_selected():
    tensor, other = torch.rand(2, 3), torch.rand(2, 4)
    for returned in (
        tensor,
        {"logits": tensor, "out": other},
        {"a": other, "out": tensor},
        {"output": tensor},
        [tensor, other],
    ):
        assert select_output(returned, "logits") is tensor
        torch.testing.assert_close(select_output(returned, "probabilities"), tensor.softmax(-1))
    assert select_output({"a": other}, lambda returned: returned["a"]) is other
    with pytest.raises(TypeError, match="return a tensor, got list"):
        select_output([other], lambda returned: returned)
    with pytest.raises(TypeError, match="floating-point"):
        select_output(tensor.argmax(1), "logits")


def test_one_entry_for_each_image():
    x = torch.rand(3, 1, 8, 8)
    f, found = evaluated(None, lambda v: v.mul_(2).mean((2, 3)), x, Options())
    assert f.shape == (3, 1)
    assert isinstance(found, R.Invariant)
    assert x.max() <= 1, "a function may write into what it is given"
    with pytest.raises(ValueError, match="one entry for each of the 3 images"):
        evaluated(None, lambda v: v.mean((0, 2, 3)), x, Options())


def test_descriptions_of_vectors_and_numbers():
    assert described(torch.zeros(3), R.Invariant(), None, "logits") == "(B,): invariant, one number for each image"
    assert (
        described(torch.zeros(3, 5), R.Invariant(), None, "probabilities") == "(B, 5): invariant, class probabilities"
    )


# What `linearise` gives besides ---------------------------------------------------------------------------------------


def model(x):
    return (x.square() * torch.arange(1, 5, dtype=x.dtype)).sum((1, 3))


X = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("names", [("rotation",), ("rotation", "scale", "stretch_x"), "affine", "all"])
def test_directions_and_tangents(names):
    asked = lm.generators(names) if isinstance(names, str) else lm.generators(*names)
    directions = torch.stack([X.flip(0), X + 1]).float()
    with torch.no_grad():
        found = linearise(model, X, asked, Options(output_representation=R.Invariant()), directions=directions)
        plain = linearise(model, X, asked, Options(output_representation=R.Invariant()))
    weights = torch.arange(1, 5).double()
    torch.testing.assert_close(found.output, model(X))
    torch.testing.assert_close(found.products, (2 * X * directions.double() * weights).sum((2, 4)))
    assert plain.products.shape == (0, 2, 6)
    assert len(found.tangents) == len(found.lie_derivatives) == len(asked)
    wanted = R.Image().tangents(X, asked, lm.Resampling())
    torch.testing.assert_close(found.tangents, wanted)
    torch.testing.assert_close(found.lie_derivatives, (2 * X * wanted * weights).sum((2, 4)))
    torch.testing.assert_close(plain.lie_derivatives, found.lie_derivatives)


@pytest.mark.parametrize("names", [("rotation",), ("rotation", "scale", "stretch_x"), "all"])
def test_products_of_mapped_tangents(names):
    """In the basis that is pushed or another, and beside directions of one's own."""
    asked = lm.generators(names) if isinstance(names, str) else lm.generators(*names)
    with torch.no_grad():
        found = linearise(
            model,
            X,
            asked,
            Options(output_representation=R.Invariant()),
            directions=X[None],
            further=lambda tangents, carrier: tangents.flip(-1),
        )
    weights = torch.arange(1, 5).double()
    torch.testing.assert_close(found.further, (2 * X * found.tangents.flip(-1) * weights).sum((2, 4)))
    torch.testing.assert_close(found.lie_derivatives, (2 * X * found.tangents * weights).sum((2, 4)))
    torch.testing.assert_close(found.products[0], 2 * model(X))


def test_the_output_moves_too():
    generator = lm.generators("rotation", "translation_x")
    representation, x = R.Image(), X[:, :1]
    with torch.no_grad():
        found = linearise(lambda v: v.sin(), x, generator, Options(resampling=lm.Resampling("cubic")))
    tangents = representation.tangents(x, generator, lm.Resampling("cubic"))
    wanted = x.cos() * tangents - representation.tangents(x.sin(), generator, lm.Resampling("cubic"))
    torch.testing.assert_close(found.lie_derivatives, wanted)
    assert isinstance(found.representation, R.Image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_inputs_of_every_precision_and_layout(dtype):
    x = X.to(dtype)
    for given in (x, x[:, :1].expand(2, 3, 6, 4), x.mT.contiguous().mT):
        with torch.no_grad():
            found = linearise(model, given, lm.generators("rotation"), Options(output_representation=R.Invariant()))
        assert found.output.dtype == found.lie_derivatives.dtype == torch.float32
        torch.testing.assert_close(found.output, model(given.float()))
    with torch.inference_mode():
        made = x.clone()
    found = linearise(model, made, lm.generators("rotation"), Options(output_representation=R.Invariant()))
    assert torch.equal(found.output, model(x.float()))


def test_what_is_checked_and_when():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x):
            return model(x) * self.scale

    def status(module, verify=True):
        options = Options(output_representation=R.Invariant())
        return linearise(module, X, lm.generators("scale"), options, verify=verify).check.status

    trained = Scaled()
    assert status(trained) == "agrees"
    assert status(trained) == "not made", "in training a model is checked once"
    assert status(Scaled()) == "agrees"
    with torch.no_grad():
        assert status(trained) == status(trained) == "agrees"
        assert status(trained, verify=False) == "not made"
    assert status(Scaled(), verify=False) == "not made"


def test_what_is_not_checked_is_not_said_to_rest():
    still = lambda x: torch.zeros_like(x).sum((2, 3))  # noqa: E731
    for verify in (False, True):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            linearise(still, X, lm.generators("scale"), verify=verify)
        assert ["does not move" in str(entry.message) for entry in told] == [True] * verify
