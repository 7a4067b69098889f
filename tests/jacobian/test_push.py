"""The methods by themselves, in which order they are tried, and the check of their products."""

import math
import warnings

import pytest
import torch
from torch.autograd.functional import jacobian

from lie_metric.jacobian import carrying, engine, push
from lie_metric.jacobian.methods import METHODS, alone, central_difference, difference, raised
from lie_metric.jacobian.refusals import Unsupported, WrittenInto
from lie_metric.jacobian.verdicts import Check, Disagreement, Jump
from lie_metric.jacobian.verification import verify


def fixed(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


W = fixed(6, 4)
X, TANGENTS = fixed(3, 2, 3, seed=1), fixed(5, 3, 2, 3, seed=2)

FUNCTIONS = {
    "rows": lambda x: (x.flatten(1) @ W).sin(),
    "numbers": lambda x: x.square().sum((1, 2)),
    "maps": lambda x: x.exp() * x[:, :1],
    "constant": lambda x: torch.ones(len(x), 2, dtype=x.dtype),
}


def true(function, x=X, tangents=TANGENTS):
    """Every entry of the Jacobian, row by row."""
    rows = torch.stack([jacobian(lambda v: function(v[None])[0], row) for row in x])
    return torch.einsum("bof,kbf->kbo", rows.reshape(len(x), -1, x[0].numel()), tangents.flatten(2)).reshape(
        len(tangents), *function(x).shape
    )


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_products_are_those_of_the_jacobian(method, name, gradients):
    function = FUNCTIONS[name]
    wanted = true(function)
    for count in (5, 1, 0):
        for chunk in (1, 2, 5):
            with torch.set_grad_enabled(gradients):
                if gradients and method in {"forward", "forward created"}:
                    with pytest.raises(Unsupported, match="gradients are enabled"):
                        METHODS[method](function, X, TANGENTS, chunk)
                    continue
                value, products = METHODS[method](function, X, TANGENTS[:count], chunk)
            assert not value.requires_grad or gradients
            assert not products.requires_grad or gradients
            torch.testing.assert_close(value.detach(), function(X))
            torch.testing.assert_close(products.detach(), wanted[:count], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6,), (1, 2, 3), (2, 1, 3, 1)])
def test_inputs_of_any_number_of_axes(method, shape):
    _, products = METHODS[method](FUNCTIONS["rows"], X.reshape(3, *shape), TANGENTS.reshape(5, 3, *shape), 2)
    torch.testing.assert_close(products.detach(), true(FUNCTIONS["rows"]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("method", ["forward vmap", "forward loop", "reverse", "double_backward"])
@pytest.mark.parametrize("of_inputs", [False, True])
def test_products_have_gradients(method, of_inputs):
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    x = X.clone().requires_grad_(of_inputs)
    with torch.enable_grad():
        value, products = METHODS[method](lambda v: (scale * v).pow(3).flatten(1), x, TANGENTS, 2)
        summed = (fixed(*products.shape, seed=3) * products).sum()
    wanted = 3 * scale**3 * (X.square() * TANGENTS).flatten(2)
    torch.testing.assert_close(products.detach(), wanted.detach())
    weights = fixed(*products.shape, seed=3)
    (found,) = torch.autograd.grad(summed, scale, retain_graph=True)
    torch.testing.assert_close(found, (weights * 9 * scale**2 * (X.square() * TANGENTS).flatten(2)).sum().detach())
    if of_inputs:
        (found,) = torch.autograd.grad(summed, x, retain_graph=True)
        wide = (weights.reshape(TANGENTS.shape) * 6 * scale**3 * X * TANGENTS).sum(0)
        torch.testing.assert_close(found, wide.detach())
        (found,) = torch.autograd.grad(value, x, torch.ones_like(value))
        torch.testing.assert_close(found, (3 * scale**3 * X.square()).detach())


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("method", ["forward vmap", "forward loop", "reverse", "double_backward"])
def test_an_output_that_depends_on_weights_alone_is_at_rest(method, gradients):
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with torch.set_grad_enabled(gradients):
        value, products = METHODS[method](lambda x: weights.exp().expand(len(x), 2), X, TANGENTS, 2)
    torch.testing.assert_close(value.detach(), torch.full((3, 2), math.e, dtype=torch.float64))
    assert products.shape == (5, 3, 2)
    assert not products.any()


def test_random_numbers_are_the_same_for_all_tangents():
    seeded = lambda x: (x * torch.rand_like(x)).flatten(1)  # noqa: E731
    torch.manual_seed(0)
    factor = torch.rand_like(X)
    torch.manual_seed(0)
    with torch.no_grad():
        _, products = METHODS["forward vmap"](seeded, X, TANGENTS, 5)
    torch.testing.assert_close(products, (factor * TANGENTS).flatten(2))


def test_reverse_mode_needs_a_row_for_each_image():
    with pytest.raises(ValueError, match="one row of outputs"):
        METHODS["reverse"](lambda x: x.sum(0), X, TANGENTS, 1)


# Differences ----------------------------------------------------------------------------------------------------------


def test_a_central_difference_is_taken_on_both_sides():
    x, t = torch.tensor([2.0], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    torch.testing.assert_close(central_difference(lambda v: v**3, x, t, 0.1), 3 * x**2 * t + 0.01 * t**3)
    torch.testing.assert_close(central_difference(torch.square, x, t, 0.5), 2 * x * t)


@pytest.mark.parametrize("size", [1e-7, 1.0, 1e5])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_differences_of_any_size(size, scale):
    x, t = scale * X, size * TANGENTS
    value, products, step = difference(lambda v: (v / scale).exp().flatten(1), None, x, t)
    torch.testing.assert_close(value, X.exp().flatten(1))
    assert 1e-7 <= step < 1e-4
    wanted = (X.exp() * TANGENTS).flatten(2)
    assert (products * scale / size - wanted).norm() < 1e-8 * wanted.norm()


def test_differences_in_float32_are_taken_in_float64_where_that_is_possible():
    x, t = X.float(), TANGENTS.float()
    wanted = (X.exp() * TANGENTS).flatten(2)
    value, products, fine = difference(lambda v: v.exp().flatten(1), None, x, t)
    assert value.dtype == products.dtype == torch.float32
    assert torch.equal(value, x.exp().flatten(1)), "the value is that of the function as it is"
    assert (products - wanted).norm() < 3e-7 * wanted.norm()
    assert fine <= 1e-3

    def narrow(v):
        assert v.dtype == torch.float32
        return v.exp().flatten(1)

    value, products, coarse = difference(narrow, None, x, t)
    assert coarse in {1e-3, 3e-3}
    assert 1e-6 * wanted.norm() < (products - wanted).norm() < 1e-3 * wanted.norm()
    value, products, fine = difference(narrow, lambda v: v.exp().flatten(1), x, t)
    assert torch.equal(value, x.exp().flatten(1))
    assert (products - wanted).norm() < 3e-7 * wanted.norm()


@pytest.mark.parametrize(
    ("steep", "factor"),
    [(1e4, lambda: 1.0), (1.0, lambda: torch.ones(1).exp().log().round())],
    ids=["steep", "single precision beside it"],
)
def test_steps_are_small_where_that_is_right(steep, factor):
    """Large ones would see another slope of the one, and are not needed for the other."""
    _, products, step = difference(lambda v: factor() * (steep * v).sin().flatten(1), None, X, TANGENTS)
    wanted = steep * ((steep * X).cos() * TANGENTS).flatten(2)
    assert (products - wanted).norm() < 1e-5 * wanted.norm()
    assert 0 < step < 1e-3


def test_differences_that_do_not_converge_are_told_and_those_of_the_largest_step_given():
    noisy = lambda v: (v + 0.3 * (1e9 * v).sin()).flatten(1)  # noqa: E731
    with pytest.warns(UserWarning, match="0.01 of the norm"):
        _, products, step = difference(noisy, None, X, TANGENTS)
    assert step == 1e-2
    sizes = X.norm() / TANGENTS.flatten(1).norm(dim=1)
    wanted = [(noisy(X + step * s * t) - noisy(X - step * s * t)) / (2 * step * s)
              for s, t in zip(sizes, TANGENTS, strict=True)]  # fmt: skip
    assert (products - torch.stack(wanted)).norm() < 1e-3 * products.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        difference(lambda v: v.flatten(1), None, X, TANGENTS)
        difference(lambda v: torch.zeros(3, 2).double(), None, X, TANGENTS)


def test_differences_along_what_bends_more_than_the_rest():
    # The sum of the tangents is linear but for a trace, for which a large step is best; one of them meets a kink in it.
    def function(v):
        return torch.stack([(v[:, 0] - 0.30003).abs(), 1e10 * v[:, 1], v[:, 2] * 0 + 1], 1)

    x = torch.tensor([[0.3, 0.2, 0.1]], dtype=torch.float64)
    _, products, step = difference(function, None, x, torch.eye(3, dtype=torch.float64)[:, None])
    assert step >= 1e-4
    wanted = torch.diag(torch.tensor([-1.0, 1e10, 0.0], dtype=torch.float64))[:, None]
    torch.testing.assert_close(products, wanted, rtol=1e-8, atol=1e-9)


def test_differences_along_nothing():
    still = torch.stack([TANGENTS[0], torch.zeros_like(X), TANGENTS[1]])
    _, products, _ = difference(lambda v: v.exp().flatten(1), None, X, still)
    assert not products[1].any()
    torch.testing.assert_close(products[[0, 2]], (X.exp() * TANGENTS[:2]).flatten(2), rtol=1e-7, atol=1e-7)
    assert difference(FUNCTIONS["rows"], None, X, TANGENTS[:0])[1].shape == (0, 3, 4)
    assert not difference(FUNCTIONS["rows"], None, X, torch.zeros_like(TANGENTS))[1].any()
    _, products, _ = difference(lambda v: (v + 1).square().flatten(1), None, 0 * X, TANGENTS)
    assert bool(torch.isfinite(products).all())


def test_what_is_raised_to_float64():
    assert raised(torch.sin, torch.cos, X)[0] is torch.sin
    function, wide, value = raised(torch.sin, torch.cos, X.float())
    assert function is torch.cos
    assert wide.dtype == value.dtype == torch.float64
    assert torch.equal(value, X.float().double().cos())
    assert raised(torch.sin, None, X.float())[0] is torch.sin
    assert raised(torch.sin, None, X.float())[2].dtype == torch.float64

    def narrow(v):
        return v.float() + 1

    function, same, value = raised(narrow, None, X.float())
    assert function is narrow
    assert same.dtype == value.dtype == torch.float32

    def failing(v):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        raised(torch.sin, failing, X.float())


# Which is tried, and when ---------------------------------------------------------------------------------------------


def planned(monkeypatch, **behaviour):
    """Methods that do as is told, and the list of those that were tried."""
    tried = []

    def method(name):
        told, honest = behaviour.get(name.replace(" ", "_")), METHODS[name]

        def run(function, inputs, tangents, chunk):
            if len(tried) < 100 and (not tried or tried[-1] != name):
                tried.append(name)
            if isinstance(told, Exception):
                raise told
            value, products = honest(function, inputs, tangents, chunk)
            return value, products if told is None else told(products)

        return run

    changed = {name: method(name) for name in METHODS}
    monkeypatch.setattr(engine, "METHODS", changed)
    return tried


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def told(*args, **kwargs):
    """What comes, and what was warned of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = push(*args, **kwargs)
    return result, " ".join(str(warning.message) for warning in found)


def test_the_order_of_methods(monkeypatch):
    refusal = Unsupported("not here")
    tried = planned(monkeypatch, forward=refusal, forward_vmap=refusal, forward_loop=refusal, double_backward=refusal)
    result, text = told(FUNCTIONS["maps"], X, TANGENTS)
    assert tried == ["forward", "forward vmap", "forward loop", "double_backward", "reverse"]
    assert result.method == result.check.method == "reverse"
    assert result.check.status == "agrees"
    assert "an operation lacks a rule" in text
    assert "not here" in text
    torch.testing.assert_close(result.products, true(FUNCTIONS["maps"]))


def test_other_ways_of_carrying_are_no_news(monkeypatch):
    planned(monkeypatch, forward=Unsupported("not here"))
    result, text = told(FUNCTIONS["maps"], X, TANGENTS)
    assert result.method == "forward vmap"
    assert text == ""


def test_tensors_that_are_created_carry_tangents_only_after_they_were_written_into(monkeypatch):
    tried = planned(monkeypatch, forward=WrittenInto("a tensor"))
    assert told(FUNCTIONS["maps"], X, TANGENTS)[0].method == "forward created"
    assert tried == ["forward", "forward created"]
    tried = planned(monkeypatch)
    assert push(FUNCTIONS["maps"], X, TANGENTS, "forward created").method == "forward created"
    assert tried == ["forward created"]


def test_a_method_that_disagrees_gives_way(monkeypatch):
    wrong = {name.replace(" ", "_"): lambda p: 1.01 * p for name in METHODS if name != "reverse"}
    tried = planned(monkeypatch, **wrong)
    result, text = told(FUNCTIONS["maps"], X, TANGENTS)
    assert tried[-1] == result.method == "reverse"
    assert "others do not agree with the function" in text
    planned(monkeypatch, **wrong, reverse=lambda p: 1.01 * p)
    with pytest.raises(RuntimeError, match=r"agrees with its own central differences.*'auto'.*method='difference'"):
        told(FUNCTIONS["maps"], X, TANGENTS)
    planned(monkeypatch, forward=lambda p: 1.01 * p)
    result, text = told(FUNCTIONS["maps"], X, TANGENTS, "forward", verified=False)
    assert result.method == "forward"
    assert str(result.check) == "forward, check not made (checked before)"
    torch.testing.assert_close(result.products, 1.01 * true(FUNCTIONS["maps"]))


def test_nothing_works(monkeypatch):
    planned(monkeypatch, **{name.replace(" ", "_"): Unsupported(f"no {name}") for name in METHODS})
    with pytest.raises(RuntimeError, match=r"differentiable by method 'auto'.*no reverse"):
        push(FUNCTIONS["maps"], X, TANGENTS)
    with pytest.raises(RuntimeError, match=r"differentiable by method 'reverse'"):
        push(FUNCTIONS["maps"], X, TANGENTS, "reverse")


@pytest.mark.parametrize(("elements", "tangents", "method"), [(1, 4, "reverse"), (1, 3, "forward"), (2, 5, "reverse"),
                                                              (3, 5, "forward")])  # fmt: skip
def test_few_outputs_are_pulled_back(elements, tangents, method):
    function = lambda x: (x.flatten(1) @ W[:, :elements]).sin()  # noqa: E731
    result = push(function, X, TANGENTS[:tangents])
    assert result.method == method
    torch.testing.assert_close(result.products, true(function, tangents=TANGENTS[:tangents]))
    assert push(function, X, TANGENTS[:tangents], "forward").method == "forward"
    assert push(function, X[:1], TANGENTS[:tangents, :1]).method == "forward"
    assert push(function, X[:2], TANGENTS[:tangents, :2]).method == method


def test_one_number_for_each_image_is_pulled_back():
    result = push(FUNCTIONS["numbers"], X, TANGENTS)
    assert result.method == "reverse"
    torch.testing.assert_close(result.products, true(FUNCTIONS["numbers"]))


def test_one_image_alone_need_not_make_a_batch():
    def even(x):
        if len(x) < 2:
            raise ValueError("batches alone")
        return x.flatten(1)[:, :1].sin()

    result = push(even, X, TANGENTS)
    assert result.method == "forward"
    assert push(lambda x: x.sum(0, keepdim=True).sin().flatten()[:1], X, TANGENTS).method == "forward"


def test_what_autograd_declares_is_asked_for_once(monkeypatch):
    """Other methods of autograd have the same derivative."""
    straight = lambda x: x.exp() + (2 * x).detach()  # noqa: E731
    tried = planned(monkeypatch, forward=Unsupported("not here"))
    with pytest.raises(
        RuntimeError, match=r"\(forward vmap: the derivative that autograd gives .*; forward: not here\)"
    ):
        push(straight, X, TANGENTS)
    assert tried == ["forward", "forward vmap"]


@pytest.mark.parametrize("cause", ["a number is taken out of torch", "memory is read by its address"])
def test_causes_come_before_what_they_lead_to(monkeypatch, cause):
    wrong = {name.replace(" ", "_"): lambda p: 1.01 * p for name in METHODS}
    planned(monkeypatch, **wrong | {"forward": Unsupported(cause)})
    with pytest.raises(RuntimeError, match=rf"none does \(forward: {cause}; forward vmap"):
        push(FUNCTIONS["maps"], X, TANGENTS)


@pytest.mark.parametrize("gradients", [False, True])
def test_what_could_not_be_told_is_not_trusted_where_following_the_function_failed(monkeypatch, gradients):
    def noisy(x):
        return SMOOTH(x) + (0.05 * (x * 1e8).sin().flatten(1)[:, :4]).detach()

    planned(monkeypatch, forward=Unsupported("not here"))
    with torch.set_grad_enabled(gradients):
        if gradients:
            result, text = told(noisy, X, TANGENTS)
            assert (result.method, result.check.status) == ("forward vmap", "inconclusive")
            assert "could not be told" in text
            return
        with pytest.raises(RuntimeError, match=r"none does \(forward vmap.*could not be told.*forward: not here"):
            push(noisy, X, TANGENTS)


def test_one_image_is_looked_at_without_a_word_of_its_own():
    """What torch says of a batch of one is of no interest; what the function says is."""

    def spread(x):
        warnings.warn("mine", UserWarning, stacklevel=1)
        return x.std(0, keepdim=True)

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        alone(spread, X[:1])
    assert [str(warning.message) for warning in found] == ["mine"]


def test_a_fault_of_the_function_is_shown_as_it_is():
    with pytest.raises(KeyError, match="mine"):
        push(lambda x: {}["mine"], X, TANGENTS)


def test_a_defect_of_a_rule_is_told(monkeypatch):
    def broken(func, args, kwargs):
        return carrying.wrap(func(args[0].value), args[0].tangents[:, :1])

    monkeypatch.setitem(carrying.RULES, "sin", broken)
    monkeypatch.setattr(carrying, "_TABLE", {})
    result, text = told(lambda x: x.sin().flatten(1), X, TANGENTS)
    assert "Please report it" in text
    assert "RuntimeError: a rule gives tangents" in text
    assert result.method == "forward vmap"
    monkeypatch.setattr(carrying, "_TABLE", {})
    monkeypatch.setitem(carrying.RULES, "sin", lambda *a: (_ for _ in ()).throw(Unsupported("not this")))
    assert "report" not in told(lambda x: x.sin().flatten(1), X, TANGENTS)[1]


def planted_shortage():
    raise torch.OutOfMemoryError


def test_memory_that_does_not_suffice(monkeypatch):
    parts = []

    def hungry(function, inputs, tangents, chunk):
        parts.append(chunk)
        if chunk > 1:
            raise torch.OutOfMemoryError
        return METHODS["forward"](function, inputs, tangents, chunk)

    monkeypatch.setattr(engine, "METHODS", METHODS | {"forward": hungry})
    result, text = told(FUNCTIONS["maps"], X, TANGENTS, "forward", verified=False)
    assert parts == [5, 3, 2, 1]
    assert "chunk_size=2" in text
    with pytest.raises(torch.OutOfMemoryError):
        push(lambda x: planted_shortage(), X, TANGENTS[:0], "forward")
    torch.testing.assert_close(result.products, true(FUNCTIONS["maps"]))
    tried = planned(monkeypatch, forward=torch.OutOfMemoryError())
    with pytest.raises(torch.OutOfMemoryError):
        told(FUNCTIONS["maps"], X, TANGENTS, chunk_size=1)
    assert tried == ["forward"]


@pytest.mark.parametrize("method", ["auto", "forward", "forward vmap", "reverse", "difference"])
def test_a_function_may_write_into_what_it_is_given(method):
    x, kept = X.clone(), TANGENTS.clone()
    result = push(lambda v: v.mul_(3).sin_().flatten(1), x, kept, method)
    assert torch.equal(x, X)
    assert torch.equal(kept, TANGENTS)
    wanted = (3 * (3 * X).cos() * TANGENTS).flatten(2)
    torch.testing.assert_close(result.products, wanted, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(result.value, (3 * X).sin().flatten(1))


def test_large_tensors_go_in_two_parts(monkeypatch):
    monkeypatch.setattr(engine, "_LARGE", 5 * 3 * 48 - 1)  # five tangents of three images of six numbers
    parts = []
    monkeypatch.setattr(engine, "METHODS", {
        name: lambda f, x, t, chunk, run=run: (parts.append(chunk), run(f, x, t, chunk))[1]
        for name, run in METHODS.items()
    })  # fmt: skip
    function = lambda x: x.exp().flatten(1)  # noqa: E731

    def first(*args, **kwargs):
        parts.clear()
        push(function, *args, verified=False, **kwargs)
        return parts[0]

    assert first(X, TANGENTS) == first(X, TANGENTS, "forward") == 3
    assert first(X, TANGENTS, chunk_size=4) == 4
    assert first(X, TANGENTS[:4]) == 4
    assert first(X[:2], TANGENTS[:, :2]) == 5
    monkeypatch.setattr(engine, "_LARGE", 3 * 3 * 48 - 1)
    assert first(X, TANGENTS[:3]) == 3, "less than four are not parted"
    with torch.enable_grad():
        assert first(X.clone().requires_grad_(), TANGENTS) == 5


def test_differences_and_gradients():
    function = lambda x: x.sin().flatten(1)  # noqa: E731
    result = push(function, X, TANGENTS, "difference")
    assert result.check.status == "not made"
    assert result.method == "difference"
    push(function, X.clone().requires_grad_(), TANGENTS, "difference")
    with torch.enable_grad():
        push(function, X, TANGENTS, "difference")
        with pytest.raises(RuntimeError, match="difference"):
            push(function, X.clone().requires_grad_(), TANGENTS, "difference")
        scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
        with pytest.raises(RuntimeError, match="difference"):
            push(lambda x: scale * function(x), X, TANGENTS, "difference")


# The check ------------------------------------------------------------------------------------------------------------


def checked(function, run=None, x=X, tangents=TANGENTS, precise=None, change=lambda p: p):
    run = run or (lambda f, v, t: METHODS["forward"](f, v, t, len(t)))
    value, products = run(function, x, tangents)
    return verify(run, "this", function, precise, x, tangents, value, change(products))


def off_by(factor):
    def run(function, x, t):
        value, products = METHODS["forward"](function, x, t, len(t))
        return value, factor * products

    return run


SMOOTH = lambda x: (x.flatten(1) @ W.to(x.dtype)).sin()  # noqa: E731


def narrow(x):
    if x.dtype != torch.float32:
        raise RuntimeError("float32 alone")
    return SMOOTH(x)


def mixing(x):
    return SMOOTH(x - x.mean(0))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("x", [X, X[:1], X.float()], ids=["float64", "one image", "float32"])
@pytest.mark.parametrize("function", [SMOOTH, mixing], ids=["apart", "mixing"])
def test_sound_products_agree(x, scale, function):
    if function is mixing and len(x) == 1:
        return
    tangents = TANGENTS[:, : len(x)].to(x.dtype)
    check = checked(lambda v: function(v / scale), None, x * scale, 1e-3 * tangents)
    assert check.status == "agrees"
    assert check.reason == ""
    assert check.difference < (1e-8 if x.dtype == torch.float64 else 1e-4)
    assert check.transposition < (1e-12 if x.dtype == torch.float64 else 1e-5)
    assert str(check).startswith("this agrees with central differences to ")


def test_sound_products_in_float32_alone_agree():
    check = checked(narrow, None, X.float(), TANGENTS.float())
    assert check.status == "agrees"
    assert check.difference < 2e-2
    assert check.transposition < 1e-5


@pytest.mark.parametrize("function", [SMOOTH, mixing])
@pytest.mark.parametrize("factor", [1.0001, 0.999, 1.5, -1.0, 0.5])
def test_a_wrong_factor_is_found(function, factor):
    with pytest.raises(Disagreement):
        checked(function, off_by(factor))
    factor = factor if factor != 1.0001 else 1.001
    with pytest.raises(Disagreement):
        checked(function, off_by(factor), X.float(), TANGENTS.float())
    with pytest.raises(Disagreement):
        checked(lambda x: function(x), off_by(factor), X.float(), TANGENTS.float(), precise=function)
    if not 0.99 < factor < 1.01:
        with pytest.raises(Disagreement):
            checked(narrow, off_by(factor), X.float(), TANGENTS.float())


def test_products_that_are_not_those_of_the_method_are_found():
    def later(p):
        return torch.cat([p[:-1], p[:1]])

    for function in (SMOOTH, mixing):
        for change in (later, lambda p: 1.0001 * p, lambda p: p.flip(0), lambda p: p + 1e-4 * p.norm()):
            with pytest.raises(Disagreement, match="linear"):
                checked(function, change=change)
        with pytest.raises(Disagreement, match="linear"):
            checked(function, x=X.float(), tangents=TANGENTS.float(), change=lambda p: 1.05 * p)
    # Sums in another order round otherwise.
    assert checked(SMOOTH, change=lambda p: (1 + 1e-9) * p).status == "agrees"
    assert checked(SMOOTH, x=X.float(), tangents=TANGENTS.float(), change=lambda p: (1 + 5e-4) * p).status == "agrees"


def test_nothing_to_compare():
    empty = Check("not made", "this", reason="there is nothing to compare")
    assert str(checked(SMOOTH, tangents=TANGENTS[:0])) == str(empty)
    assert str(checked(lambda x: x[:, :0].flatten(1))) == str(empty)
    for number in (math.nan, math.inf):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check = checked(lambda x, n=number: SMOOTH(x) * n)
        assert check.status == "not made"
        assert "finite" in check.reason
    still = checked(SMOOTH, tangents=torch.cat([TANGENTS[:2], torch.zeros(1, *X.shape).double()]))
    assert still.status == "agrees"
    assert checked(FUNCTIONS["constant"]).status == "agrees"


def test_jumps_are_refused():
    with pytest.raises(Disagreement, match="jumps"):
        checked(lambda x: SMOOTH(x) + (1e4 * x.flatten(1)[:, :4]).round() / 10)
    with pytest.raises(Jump):
        checked(lambda x: (1e4 * x.flatten(1)).round())
    with pytest.raises(Jump):
        checked(lambda x: (20 * x.flatten(1)[:, :4] + 0.5).round())  # at rest for a hundredth of its size
    assert checked(lambda x: SMOOTH(x) + (1e4 * x.flatten(1)[:, :4]).round() / 1e9).status == "agrees"


def test_a_part_that_is_lost_is_named():
    def nothing(function, x, t):
        value, products = METHODS["forward"](function, x, t, len(t))
        return value, torch.zeros_like(products)

    with pytest.raises(Disagreement, match="exactly zero"):
        checked(SMOOTH, nothing)
    with pytest.raises(Disagreement, match="lost or changed"):
        checked(SMOOTH, off_by(0.5))
    reverse = lambda f, x, t: METHODS["reverse"](f, x, t, 1)  # noqa: E731
    straight = lambda x: SMOOTH(x) + (x.square() - x).flatten(1)[:, :4].detach() + x.flatten(1)[:, :4]  # noqa: E731
    with pytest.raises(Disagreement, match="straight-through"):
        checked(straight, reverse)
    check = checked(straight)
    assert check.status == "agrees"
    assert check.reason.startswith("reverse mode gives another")
    assert "(reverse mode" in str(check)


def test_another_derivative_by_reverse_mode_that_is_at_right_angles_to_the_product_is_told():
    straight = lambda x: torch.cat([SMOOTH(x), SMOOTH(x) - SMOOTH(x).detach()], 1)  # noqa: E731
    check = checked(straight)
    assert check.status == "agrees"
    assert check.reason.startswith("reverse mode gives another")


def test_what_is_lost_in_the_images_that_depend_on_the_last_is_found():
    """The last image holds the largest number: its own value and derivative are right."""
    x = X.clone()
    x[-1] *= 4

    def lost(function, v, t):
        _, products = METHODS["forward"](SMOOTH, v, t, len(t))
        _, largest = METHODS["forward"](lambda u: u.flatten(1).amax(1), v, t, len(t))
        own = (v.flatten(1).amax(1) == v.amax()).to(v)
        return function(v), products * v.amax() + SMOOTH(v) * (own * largest)[..., None]

    with pytest.raises(Disagreement):
        checked(lambda v: SMOOTH(v) * v.amax(), lost, x=x)


def test_no_reverse_mode_is_said():
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.square()

        @staticmethod
        def backward(ctx, g):
            raise NotImplementedError("there is none\nat all")

    check = checked(lambda x: Forward.apply(x).flatten(1))
    assert check.status == "agrees"
    assert check.reason == "no reverse mode: there is none"
    assert math.isnan(check.transposition)


def test_noise_is_inconclusive():
    def noisy(x):
        with torch.no_grad():
            return SMOOTH(x) + 0.05 * (x * 1e8).sin().flatten(1)[:, :4]

    smooth = lambda f, x, t: (f(x), METHODS["forward"](SMOOTH, x, t, len(t))[1])  # noqa: E731
    check = checked(noisy, smooth)
    assert check.status == "inconclusive"
    assert check.difference > 0.05
    assert "do not converge" in str(check)


def test_ties_and_kinks_at_the_inputs_are_no_disagreement():
    for x in (torch.zeros_like(X), X.clamp(min=0)):
        assert checked(lambda v: SMOOTH(v.relu()) + v.flatten(1)[:, :4], x=x).status == "agrees"
        with pytest.raises(Disagreement):
            checked(lambda v: SMOOTH(v.relu()) + v.flatten(1)[:, :4], off_by(0.99), x=x)


def test_one_image_that_depends_on_what_is_beside_it():
    """Where nothing shows that images are apart, several places on a line are no batch."""
    check = checked(lambda v: SMOOTH(v) / SMOOTH(v).norm(), x=X[:1], tangents=TANGENTS[:, :1])
    assert check.status == "agrees"
    assert check.difference < 1e-8


def test_a_check_says_the_same_again_and_leaves_random_states():
    before = torch.get_rng_state()
    assert checked(SMOOTH) == checked(SMOOTH)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_that_does_not_suffice_is_not_passed_over():
    def hungry(x):
        if len(x) == 3:
            return SMOOTH(x)
        raise torch.OutOfMemoryError

    run = lambda f, x, t: METHODS["forward"](SMOOTH, x, t, len(t))  # noqa: E731
    with pytest.raises(torch.OutOfMemoryError):
        checked(hungry, run)


def test_one_image_is_enough_where_images_are_apart():
    seen = []

    def run(function, x, t):
        seen.append(len(x))
        return METHODS["forward"](function, x, t, len(t))

    assert checked(SMOOTH, run).status == "agrees"
    assert seen == [3, 1]
    seen.clear()
    assert checked(mixing, run).status == "agrees"
    assert set(seen) == {3}


STRAIGHT = lambda x: SMOOTH(x) + 3 * x.square().flatten(1)[:, :4].detach()  # noqa: E731


def test_float32_alone_is_told_of_another_derivative():
    def alone(function):
        def f(x):
            if x.dtype != torch.float32:
                raise RuntimeError("float32 alone")
            return function(x)

        return f

    assert checked(alone(SMOOTH), None, X.float(), TANGENTS.float()).reason == ""
    check = checked(alone(STRAIGHT), None, X.float(), TANGENTS.float())
    assert check.status == "agrees"
    assert check.reason.startswith("reverse mode gives another")
    reverse = lambda f, x, t: METHODS["reverse"](f, x, t, 1)  # noqa: E731
    with pytest.raises(Disagreement, match="straight-through"):
        checked(alone(STRAIGHT), reverse, X.float(), TANGENTS.float())


def test_what_differences_cannot_tell_transposition_may():
    def noisy(x):
        return SMOOTH(x) + (0.05 * (x * 1e8).sin().flatten(1)[:, :4]).detach()

    def run(factor):
        return lambda f, x, t: (f(x), factor * METHODS["forward"](SMOOTH, x, t, len(t))[1])

    check = checked(noisy, run(1.0))
    assert check.status == "inconclusive"
    assert check.transposition < 1e-12
    with pytest.raises(Disagreement, match="lost or changed"):
        checked(noisy, run(1.2))


def test_jumps_beside_kinks_are_refused():
    x = X.clamp(min=0)
    sound = lambda v: SMOOTH(v.relu()) + v.flatten(1)[:, :4]  # noqa: E731
    assert checked(sound, x=x).reason == ""
    with pytest.raises(Disagreement, match="jumps"):
        checked(lambda v: sound(v) + (1e4 * v.flatten(1)[:, :4] + 0.37).round() / 10, x=x)
    assert checked(lambda v: sound(v) + (1e4 * v.flatten(1)[:, :4] + 0.37).round() / 1e7, x=x).status == "agrees"


@pytest.mark.parametrize("grain", [0.02, 0.005, 0.001])
def test_rounding_that_differences_see_as_noise_is_a_jump(grain):
    """In single precision, where steps are so large that a fine grain changes the slope by a few percent alone."""

    def rounded(x):
        if x.dtype != torch.float32:
            raise RuntimeError("float32 alone")
        return SMOOTH(x).div(grain).round() * grain

    straight = lambda f, x, t: (f(x), METHODS["forward"](SMOOTH, x, t, len(t))[1])  # noqa: E731
    with pytest.raises(Jump):
        checked(rounded, straight, X.float(), TANGENTS.float())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_jumps_far_away_matter_where_there_is_no_derivative_alone(scale):
    """A hundredth of the image's norm away, and on the way a kink, so that differences of several steps are taken."""
    x = X.clamp(min=0)
    step = lambda v: ((v - x[-1]).flatten(1)[:, :1] > 0.01 * x[-1].norm()).to(v)  # noqa: E731
    assert checked(lambda v: scale * (SMOOTH(v.relu()) + step(v)), x=x).status == "agrees"
    with pytest.raises(Jump):
        checked(lambda v: scale * (1 + step(v)), x=x)


def test_rounding_of_derivatives_that_are_nothing_beside_the_values_is_not_told():
    cancelled = lambda v: ((1e6 * v + v) - 1e6 * v).flatten(1)[:, :4] + 1e9  # noqa: E731
    check = checked(cancelled, x=X.float(), tangents=TANGENTS.float())
    assert check.status == "agrees"
    assert not check.warning


@pytest.mark.parametrize("steep", [1.0, 40.0])
def test_half_precision_has_steps_of_its_own(steep):
    """Of a sine of forty periods in an image the largest see the other side."""
    x, tangents = fixed(3, 6, 100, seed=1), fixed(5, 3, 6, 100, seed=2)

    def run(factor):
        smooth = lambda v: (steep * v).sin().flatten(1)  # noqa: E731
        return lambda f, v, t: (f(v), factor * METHODS["forward"](smooth, v, t, len(t))[1])

    coarse = lambda v: (steep * v).sin().bfloat16().to(v.dtype).flatten(1)  # noqa: E731
    check = checked(coarse, run(1.0), x, tangents)
    assert check.status == "agrees"
    assert check.difference < 0.1
    assert "half precision" in check.warning
    for factor in (3.0, -1.0):
        with pytest.raises(Disagreement):
            checked(coarse, run(factor), x, tangents)
    if steep == 1:
        with pytest.raises(Jump):
            checked(lambda v: coarse(v) + 5 * (4 * v.flatten(1)[:, :1]).round(), run(1.0), x, tangents)


@pytest.mark.parametrize("x", [X, X.float()], ids=["float64", "float32"])
def test_differences_that_are_not_finite_show_nothing(x):
    """Powers have a derivative at zero, which black images are, and no value below it."""
    black, tangents = x.clamp(min=0), TANGENTS.to(x.dtype)
    power = lambda v: v.pow(2.2).flatten(1)  # noqa: E731
    check = checked(power, x=black, tangents=tangents)
    assert check.status == "agrees"
    assert 0 < check.difference < 1e-4
    for factor in (1.5, 0.99, 0.0):
        with pytest.raises(Disagreement):
            checked(power, off_by(factor), x=black, tangents=tangents)


def test_a_function_that_has_no_values_beside_the_inputs_is_inconclusive():
    """It is linear where it has values; transposition still tells of what is lost."""
    known = lambda v: (v.flatten(1) @ W.to(v.dtype)) / torch.isin(v, torch.cat([X, X.float().double()]).to(v)).all()  # noqa: E731
    linear = lambda v: v.flatten(1) @ W.to(v.dtype)  # noqa: E731
    run = lambda f, v, t: (f(v), METHODS["forward"](linear, v, t, len(t))[1])  # noqa: E731
    check = checked(known, run)
    assert check.status == "inconclusive"
    assert check.reason == "the function is not finite beside the inputs"
    assert math.isnan(check.difference)


def test_a_derivative_that_is_wrong_at_the_image_alone_is_told():
    """A mask of zeros times the image is the image, and its derivative by a product's rule lacks the black pixels."""
    masked = lambda v: SMOOTH(v * (v != 0))  # noqa: E731
    x = X.clamp(min=0)
    check = checked(masked, x=x)
    assert check.status == "agrees"
    assert "off the change that is seen on both sides" in check.warning
    assert not checked(SMOOTH, x=x).warning


def test_a_method_that_does_not_run_in_float64_is_checked_in_float32():
    tried = []

    def run(factor):
        def narrow_run(function, x, t):
            tried.append(x.dtype)
            if x.dtype != torch.float32:
                raise RuntimeError("float32 alone")
            return function(x), factor * METHODS["forward"](SMOOTH, x, t, len(t))[1]

        return narrow_run

    def precise():
        calls = []

        def function(x):
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("not at the first time")
            return SMOOTH(x)

        return function

    check = checked(SMOOTH, run(1.0), X.float(), TANGENTS.float(), precise())
    assert check.status == "agrees"
    assert tried[-1] == torch.float32
    with pytest.raises(Disagreement):
        checked(SMOOTH, run(1.2), X.float(), TANGENTS.float(), precise())
    with pytest.raises(RuntimeError, match="float32 alone"):
        checked(lambda x: 5 * x.relu().flatten(1)[:, :4], run(1.0), X.clamp(min=0).float(), TANGENTS.float())
