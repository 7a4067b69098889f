"""What tensors that carry tangents do beside operations with rules: what they refuse, draws, views that are locked."""

import copy
import math
import pickle

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lie_metric.jacobian.carrying import Dual, wrap
from lie_metric.jacobian.pushing import Fused, push_forward
from lie_metric.jacobian.refusals import Unsupported, WrittenInto

aten = torch.ops.aten


def fixed(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, T = fixed(2, 3, 4, seed=1), fixed(5, 2, 3, 4, seed=2)


@pytest.fixture(autouse=True)
def _conditions():
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def push(function, created=False, x=X, tangents=T):
    return push_forward(function, x.clone(), tangents.clone(), created)


def holds(function, slope, created=False):
    """That a pointwise function has this derivative."""
    _, products = push(function, created)
    torch.testing.assert_close(products, (slope * T).expand_as(products), rtol=1e-10, atol=1e-12)


# Refusals -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("lie_metric_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


REFUSED = {
    "an operation of another library": (twice, "no operation of torch"),
    "item": (lambda v: v * v.sum().item(), "a number is taken out"),
    "float": (lambda v: v * float(v[0, 0, 0]), "a number is taken out"),
    "numpy": (lambda v: v * torch.from_numpy(v.numpy()), "memory"),
    "tolist": (lambda v: v * torch.tensor(v.tolist()), "memory"),
    "address": (lambda v: v * v.data_ptr(), "memory"),
    "storage": (lambda v: v * len(v.untyped_storage()), "memory"),
    "old storage": (lambda v: v * len(v.storage()), "memory"),
    "dlpack": (lambda v: v * torch.from_dlpack(v), "memory"),
    "pickled": (lambda v: v * pickle.loads(pickle.dumps(v)), "memory"),
    "shared with other processes": (lambda v: v.share_memory_(), "memory"),
    "its data exchanged": (lambda v: setattr(v, "data", v * 2), "attribute `data`"),
    "transposed in place": (lambda v: (v * 2).transpose_(0, 1), "changes the shape of a tensor in place"),
    "an axis more in place": (lambda v: (v * 2).unsqueeze_(0), "changes the shape of a tensor in place"),
    "into another": (lambda v: torch.add(v, v, out=v * 1), "add writes into a tensor"),
    "wider numbers in place": (lambda v: v.float().add_(v), "not followed"),
    "a larger tensor in place": (lambda v: (v[0] * 2).add_(v), "not followed"),
    "bits": (lambda v: (v * 2).view(torch.int64).double(), "bits"),
    "random numbers of its own": (lambda v: torch.bernoulli(v.sigmoid()) * v, "draws random numbers"),
    "normal numbers around it": (lambda v: torch.normal(v, 1.0), "draws random numbers"),
    "a sample of it": (lambda v: v[0] * torch.multinomial(v[0, 0].exp(), 1), "draws random numbers"),
    "a side result": (lambda v: torch.native_layer_norm(v * 2, (4,), None, None, 1e-5)[1] * 2, "side result"),
    "a side result of groups": (
        lambda v: torch.native_group_norm(v * 2, None, None, 2, 3, 4, 3, 1e-5)[1] * 2,
        "native_group_norm",
    ),
    "a copy of a side result": (
        lambda v: (2 * torch.native_layer_norm(v * 2, (4,), None, None, 1e-5)[2]).clone() + 1,
        "side result",
    ),
    "two tensors": (lambda v: (v, v), "returns tuple"),
    "number": (lambda v: 3.0, "returns float"),
    "tensor of a transform": (lambda v: _leaked(v), "transform that has ended"),
    "constant of a transform": (lambda v: _leaked(torch.ones(2)), "transform that has ended"),
}


def _leaked(x):
    kept = []
    torch.vmap(lambda row: kept.append(row) or row * 2)(x)
    return kept[0]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, reason = REFUSED[name]
    with pytest.raises(Unsupported, match=reason):
        push(function)


def test_what_a_refusal_names_may_be_done_with_other_tensors():
    holds(lambda v: v * twice(torch.ones(())).item() * float(torch.ones(1)) + torch.ones(1, 2, 1).transpose_(0, 1), 2.0)
    holds(lambda v: v * len(torch.ones(3).untyped_storage()) * torch.bernoulli(torch.ones(())), 12.0)
    holds(lambda v: torch.native_layer_norm(torch.ones(2, 3, 4), (4,), None, None, 1e-5)[1].double() * 0 + v, 1.0)


@pytest.mark.parametrize("created", [False, True])
def test_writing_into_what_does_not_move(created):
    def function(v):
        z = torch.zeros(2, 3, 4, dtype=torch.float64)
        z[1] = v[1] * 2
        return z + v

    slope = torch.tensor([1.0, 3.0]).double().reshape(2, 1, 1)
    if created:
        holds(function, slope, True)
    else:
        with pytest.raises(WrittenInto, match="copy_"):
            push(function)
    kept = torch.zeros_like(X)
    with pytest.raises(WrittenInto, match="add_"):
        push(lambda v: kept.add_(v), created)
    assert not kept.any()


CREATED = {
    "zeros": lambda v: torch.zeros(2, 3, 4, dtype=v.dtype),
    "ones": lambda v: torch.ones(2, 3, 4, dtype=v.dtype),
    "full": lambda v: torch.full((2, 3, 4), 2.0, dtype=v.dtype),
    "empty": lambda v: torch.empty(2, 3, 4, dtype=v.dtype).fill_(1),
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": lambda v: torch.full_like(v, 2.0),
    "empty_like": lambda v: torch.empty_like(v).fill_(1),
    "zeros like another": lambda v: torch.zeros_like(X),
    "new_zeros": lambda v: v.new_zeros(2, 3, 4),
    "new_ones": lambda v: v.new_ones(2, 3, 4),
    "new_full": lambda v: v.new_full((2, 3, 4), 2.0),
    "new_empty": lambda v: v.new_empty(2, 3, 4).zero_(),
    "empty_strided": lambda v: torch.empty_strided((2, 3, 4), (12, 1, 3), dtype=v.dtype).zero_(),
    "a copy": lambda v: X.clone(),
    "numbers": lambda v: torch.arange(24, dtype=v.dtype).view(2, 3, 4),
    "a range": lambda v: torch.linspace(0, 1, 24, dtype=v.dtype).view(2, 3, 4),
    "of a type": lambda v: torch.ones(2, 3, 4).to(v.dtype),
    "a list": lambda v: torch.tensor(X.tolist(), dtype=v.dtype),
    "identity": lambda v: torch.eye(24, 24, dtype=v.dtype)[:1].view(2, 3, 4),
}


@pytest.mark.parametrize("name", CREATED)
def test_what_is_created_can_be_written_into(name):
    def function(v):
        made = CREATED[name](v)
        view = made[1]
        made.add_(v.sin()).mul_(2)
        made[0] += 1
        return made + view * torch.arange(3, dtype=torch.long)[:, None]

    slope = 2 * X.cos()
    added = (slope[1] * torch.arange(3)[:, None] * T[:, 1])[:, None]
    _, products = push(function, created=True)
    torch.testing.assert_close(products, slope * T + added)
    whole = push(lambda v: torch.ones(3).add_(1), created=True)
    assert whole[1].shape == (5, 3)
    assert not whole[1].any()


def test_integers_that_are_created_are_used_as_always():
    def function(v):
        made = torch.zeros(2, 3, 4, dtype=v.dtype)
        for row in torch.arange(2).tolist():
            made[row] = v[row] * (row + 1)
        return made

    holds(function, torch.tensor([1.0, 2.0]).double().reshape(2, 1, 1), created=True)


def test_a_constant_has_no_derivative():
    _, products = push(lambda v: torch.ones(3, 2))
    assert products.shape == (5, 3, 2)
    assert not products.any()
    assert not push(torch.zeros_like)[1].any()
    assert push(lambda v: v.new_ones(()))[1].shape == (5,)


def test_an_unused_side_result_is_no_reason_to_refuse():
    _, products = push(lambda v: torch.native_layer_norm(v, (4,), None, None, 1e-5)[0])
    wanted = torch.stack([torch.func.jvp(lambda v: F.layer_norm(v, (4,)), (X,), (t,))[1] for t in T])
    torch.testing.assert_close(products, wanted)


INFERRED = {
    "another shape": lambda v: v.mT.reshape(-1).view(2, 12).flatten(),
    "close together": lambda v: v.mT.contiguous().sin(),
    "square": lambda v: v.square(),
    "by places": lambda v: v.take_along_dim(torch.zeros(2, 3, 1, dtype=torch.long), -1),
    "linear": lambda v: F.linear(v, X[0]),
    "conjugate": lambda v: (v * (1 + 2j)).conj().resolve_conj().imag.resolve_neg(),
}


@pytest.mark.parametrize("name", INFERRED)
def test_functions_that_enter_inference_mode(name):
    """There operations arrive as a whole that are otherwise taken apart before."""

    def function(v):
        with torch.inference_mode():
            return INFERRED[name](v)

    _, products = push(function)
    torch.testing.assert_close(products, torch.stack([torch.func.jvp(INFERRED[name], (X,), (t,))[1] for t in T]))


def test_changes_in_inference_mode_are_seen_by_other_names():
    def function(v):
        with torch.inference_mode():
            z = v * 2
            same = torch.positive(z)
            z.add_(v)
            return same

    holds(function, 3.0)


def test_copies_of_python_move_and_are_others():
    def function(v):
        memo = {}
        one = copy.deepcopy(v, memo)
        assert copy.deepcopy(v, memo) is one
        one.mul_(3)
        return one + v + v.data

    holds(function, 5.0)


# Values that do not move ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "still",
    [
        torch.round,
        torch.floor,
        torch.ceil,
        torch.trunc,
        torch.sign,
        torch.isnan,
        torch.zeros_like,
        torch.rand_like,
        torch.argmax,
        lambda v: v > 0,
        lambda v: v.long(),
        lambda v: v.argsort(-1),
        lambda v: torch.randn_like(v),
        lambda v: torch.full_like(input=v, fill_value=2.0),
    ],
)
def test_results_without_tangents(still):
    found = []
    push(lambda v: found.append(still(v * 2)) or v)
    assert type(found[0]) is torch.Tensor
    torch.manual_seed(0)
    again = []
    push(lambda v: again.append(still(v * 2)) or v)
    torch.manual_seed(0)
    assert torch.equal(again[0], still(X * 2))


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_dropout_is_one_draw_for_value_and_tangents(probability):
    value, products = push(lambda v: F.dropout(v, probability, True))
    factor = value / X
    torch.testing.assert_close(products, factor * T)
    kept = {0.0} if probability == 1 else {0.0, 1 / (1 - probability)} if probability else {1.0}
    assert {round(number, 9) for number in factor.flatten().tolist()} <= {round(number, 9) for number in kept}
    found = []
    holds(lambda v: found.append(torch.native_dropout(v, 0.3, False)) or found[0][0], 1.0)
    assert bool(found[0][1].all())
    found.clear()
    value, _ = push(lambda v: found.append(torch.native_dropout(v, 0.3, True)) or found[0][0])
    assert torch.equal(found[0][1], value != 0)


def test_attention_that_drops():
    q = fixed(1, 2, 4, 4, seed=3)
    tangents = fixed(2, 1, 2, 4, 4, seed=4)

    def function(v):
        torch.manual_seed(0)
        return F.scaled_dot_product_attention(v, v * 2, v, dropout_p=0.5)

    _, products = push_forward(function, q, tangents)
    h = 1e-6
    for t, product in zip(tangents, products, strict=True):
        torch.testing.assert_close(product, (function(q + h * t) - function(q - h * t)) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [bool, float])
def test_rows_of_attention_that_are_masked_as_a_whole_are_zero(kind):
    q, tangents = fixed(1, 2, 4, 4, seed=3), fixed(2, 1, 2, 4, 4, seed=4)
    seen = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    mask = seen if kind is bool else torch.zeros(4, 4).double().masked_fill(~seen, -math.inf)
    value, products = push_forward(lambda v: F.scaled_dot_product_attention(v, v * 2, v, attn_mask=mask), q, tangents)
    assert not value[:, :, 1].any()
    assert not products[:, :, :, 1].any()
    torch.testing.assert_close(products[:, :, :, 3], tangents[:, :, :, 3])
    function = lambda v: F.scaled_dot_product_attention(v[:, :, 2:3], v * 2, v)  # noqa: E731
    wanted = torch.stack([torch.func.jvp(function, (q,), (t,))[1] for t in tangents])
    torch.testing.assert_close(products[:, :, :, 2:3], wanted)


@pytest.mark.parametrize("change", [lambda z: z.div_(0.3, rounding_mode="floor"), lambda z: z.round_()])
def test_rounding_in_place(change):
    value, products = push(lambda v: change(v * 2) + v)
    torch.testing.assert_close(value, change(X * 2) + X)
    torch.testing.assert_close(products, T)


# Views ----------------------------------------------------------------------------------------------------------------


def test_a_conjugate_view_forbids_changes_as_long_as_it_is_in_use():
    turn = 1 + 2j

    def changed_below(v):
        z = v * turn
        view = z.conj()
        z.mul_(2)
        return view.real + z.real

    def changed_above(v):
        z = v * turn
        view = z.conj()
        view.mul_(2)
        return view.real + z.real

    for function in (changed_below, changed_above):
        with pytest.raises(Unsupported, match="conjugate or negative view"):
            push(function)

    def view_gone(v):
        z = v * turn
        part = z.conj().real.clone()
        z.mul_(2)
        return z.real + part

    holds(view_gone, 3.0)


def test_memory_that_is_seen_as_two_types():
    def function(v):
        z = v * (1 + 2j)
        part = z.real
        z.mul_(2)
        return part

    with pytest.raises(Unsupported, match="two types"):
        push(function)


def test_views_of_views_of_every_layout_see_a_change():
    def function(v):
        z = v * 1
        views = [
            z,
            z[1:],
            z.transpose(0, 2),
            z.view(-1)[5:],
            z[:, ::2],
            z[..., 1],
            z.unsqueeze(0),
            z.expand(2, 2, 3, 4),
            z.as_strided((1, 3), (0, 1)),
            z[:0],
        ]
        z[1, 1:].mul_(v[0, 1:])
        views[2][1].add_(1)
        views[3][::3].sin_()
        return torch.cat([view.reshape(-1) for view in views])

    value, products = push(function)
    wanted = [torch.func.jvp(function, (X,), (t,)) for t in T]
    torch.testing.assert_close(value, wanted[0][0])
    torch.testing.assert_close(products, torch.stack([product for _, product in wanted]))


def test_families_that_meet_become_one():
    memory = X.clone()
    one, other = wrap(memory[0], T[:, 0].clone()), wrap(memory[1], T[:, 1].clone())
    far = wrap(X.clone(), T.clone())
    assert one.aliases is not other.aliases
    whole = wrap(memory, T.clone(), (one, 3, far, other))
    assert one.aliases is other.aliases is whole.aliases
    assert far.aliases is not whole.aliases
    assert {id(member()) for member in whole.aliases} >= {id(one), id(other), id(whole)}
    with Fused():
        whole.mul_(2)
    assert torch.equal(one.tangents, 2 * T[:, 0])
    assert torch.equal(other.value, 2 * X[1])
    assert torch.equal(far.value, X)


def test_tangents_have_the_shape_of_the_value():
    with pytest.raises(RuntimeError, match=r"tangents of shape \(5, 2, 3, 4\) to \(2, 3\)"):
        wrap(X[..., 0], T)
    dual = wrap(X[..., :2].mT, T[..., :2].mT)
    assert isinstance(dual, Dual)
    assert (dual.shape, dual.stride(), dual.storage_offset(), dual.dtype) == ((2, 2, 3), (12, 1, 4), 0, torch.float64)
    assert wrap(X[1], T[:, 1]).storage_offset() == 12
    assert wrap(X.float(), T.float()).dtype == torch.float32
    assert wrap(X.to("meta"), T.to("meta")).device.type == "meta"


@pytest.mark.parametrize(
    "change",
    [lambda z, o: z.add_(o), lambda z, o: z.sub_(o, alpha=2), lambda z, o: z.add_(o.sin()), lambda z, o: z.mul_(2)],
)
def test_a_change_where_nobody_sees_needs_no_new_memory(change):
    raw = T.clone()
    dual, other = wrap(X.clone(), raw), wrap(X.clone(), T.clone())
    change(dual, other)
    assert dual.tangents.data_ptr() == raw.data_ptr()


def test_tangents_that_were_copied_are_changed_where_they_are():
    dual = wrap(X.mT, T.mT)
    flat, other = dual.reshape(-1), wrap(X.flatten(), T.flatten(1))
    place = flat.tangents.data_ptr()
    flat.add_(other)
    assert flat.tangents.data_ptr() == place
    assert torch.equal(dual.tangents, T.mT)


def test_views_by_strides_of_tangents_laid_out_otherwise():
    turned = wrap(X.mT.contiguous().mT, T.clone())
    found = turned.as_strided((2, 3), (12, 1), 3)
    assert torch.equal(found.value, X[..., 1])
    assert torch.equal(found.tangents, T[..., 1])


# Modes of others ------------------------------------------------------------------------------------------------------


class Seeing(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "function",
    [
        lambda v: F.layer_norm(v.sin(), (4,)),
        lambda v: torch.maximum(v, X).softmax(-1),
        lambda v: F.scaled_dot_product_attention(v[None], v[None], v[None]),
        torch.jit.trace(lambda v: v.sin().softmax(-1), X),
    ],
    ids=["layer norm", "any operation", "attention", "traced"],
)
def test_modes_see_of_a_function_what_is_its_own(function):
    with Seeing() as wanted:
        function(X)
    found = []
    with Seeing() as seeing:

        def watched(v):
            start = len(seeing.names)
            result = function(v)
            found.extend(seeing.names[start:])
            return result

        push(watched)
    assert set(found) <= set(wanted.names)


def test_weights_do_not_make_what_is_found_in_inference_mode_require_gradients():
    weight = torch.nn.Parameter(X * 2)

    def function(v):
        with torch.inference_mode():
            return torch.maximum(v, weight)

    value, products = push(function)
    assert not value.requires_grad
    assert not products.requires_grad
