"""Tensors that carry tangents, rule by rule against forward mode, and what they refuse to follow."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lie_metric as lm
from lie_metric.jacobian.carrying import Dual
from lie_metric.jacobian.pushing import push_forward
from lie_metric.jacobian.refusals import Unsupported
from lie_metric.lie import linearise
from lie_metric.running import isolated

torch.manual_seed(0)
W = torch.randn(5, 6, dtype=torch.float64)
BIAS = torch.randn(5, dtype=torch.float64)
KERNEL = torch.randn(4, 3, 3, 3, dtype=torch.float64)
MASK = torch.rand(6, 6) > 0.3
OTHER = torch.randn(2, 3, 6, 6, dtype=torch.float64)


def branch(x):
    y = x.clone()
    y += x * 2  # in place on a tensor of its own
    y.mul_(0.5)
    return F.relu(y, inplace=True) + x


def same_object(x):
    y = shortcut = x * 3
    y += 1
    return y * shortcut


def mixed_outputs(x):
    values, indices = x.flatten(1).topk(3)
    return values * indices.to(values.dtype)


FUNCTIONS = {
    "linear": lambda x: F.linear(x, W, BIAS),
    "linear keyword": lambda x: F.linear(x, weight=W, bias=BIAS),
    "linear in the weight": lambda x: F.linear(W[:, :6], x[0, 0]),
    "conv2d": lambda x: F.conv2d(x, KERNEL, BIAS[:4], stride=2, padding=1),
    "conv2d unbatched": lambda x: F.conv2d(x[0], KERNEL),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, KERNEL.transpose(0, 1), stride=2),
    "batch norm": nn.BatchNorm2d(3).double().eval(),
    "layer norm": nn.LayerNorm(6).double(),
    "layer norm two axes": nn.LayerNorm((6, 6), elementwise_affine=False).double(),
    "layer norm of a view": lambda x: F.layer_norm(x.mT, (6,), W[0], W[1]),
    "group norm": nn.GroupNorm(3, 3).double(),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": nn.ReLU(inplace=False),
    "hardswish": F.hardswish,
    "pow": lambda x: (x.abs() + 1) ** 1.5,
    "base of a power": lambda x: 2**x,
    "softmax": lambda x: x.softmax(-1),
    "softmax functional": lambda x: F.softmax(x, dim=1),
    "softmax dtype": lambda x: F.softmax(x, dim=1, dtype=torch.float64),
    "attention": lambda x: F.scaled_dot_product_attention(x, x * 2, x.flip(2)),
    "attention mask": lambda x: F.scaled_dot_product_attention(x, x * 2, x, attn_mask=MASK),
    "attention bias": lambda x: F.scaled_dot_product_attention(x, x * 2, x, attn_mask=OTHER[:, :1], scale=0.3),
    "attention causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "attention fixed keys": lambda x: F.scaled_dot_product_attention(x, OTHER, x),
    "matmul": lambda x: x @ x.mT + x @ OTHER.mT + OTHER @ x,
    "matmul broadcast": lambda x: x @ W.T,
    "vector": lambda x: x.flatten(1) @ torch.ones(108, dtype=torch.float64),
    "broadcast sum": lambda x: x[0, 0] + OTHER - x.mean(),
    "alpha": lambda x: torch.add(x, x.mean((2, 3), keepdim=True), alpha=0.25) + torch.sub(OTHER, x, alpha=2),
    "reversed": lambda x: 1 - x + (1 / (x.square() + 1)),
    "broadcast product": lambda x: x[0] * OTHER * x[:, :1] * 2,
    "quotient": lambda x: x / (x.square() + 1) / OTHER / 2,
    "cat": lambda x: torch.cat([x, OTHER, x * 2], dim=1) + torch.cat([OTHER, x, x], -3),
    "stack": lambda x: torch.stack([x, OTHER]),
    "split": lambda x: torch.cat([part * k for k, part in enumerate(x.chunk(3, dim=1))]),
    "unbind": lambda x: sum(part.sin() for part in x.unbind(2)),
    "index": lambda x: x[:, [0, 2], ..., ::2],
    "mask index": lambda x: x.masked_fill(OTHER > 0, 2.0),
    "roll": lambda x: torch.roll(x, (1, 2), (2, 3)).permute(0, 2, 3, 1).reshape(2, -1, 6),
    "pad": lambda x: F.pad(x, (1, 0, 2, 1)) + F.pad(x, (1, 0, 2, 1), value=3.0).exp(),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "average pool": lambda x: F.adaptive_avg_pool2d(F.avg_pool2d(x, 2), 1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "einsum": lambda x: torch.einsum("bchw,bchv->bcwv", x, x),
    "normalise": lambda x: F.normalize(x, dim=-1),
    "where": lambda x: torch.where(x > 0, x, 2 * x),
    "maximum": lambda x: torch.maximum(x, OTHER),
    "dropout": lambda x: F.dropout(x, 0.5, training=False) + nn.Dropout(0.5).eval()(x),
    "change a view": lambda x: change_a_view(x),
    "change under a view": lambda x: change_under_a_view(x),
    "properties": lambda x: x.mT.flatten(1) * x.shape[0] * x.ndim + x.new_ones(1),
    "in place": branch,
    "in place, two names": same_object,
    "several outputs": mixed_outputs,
    "statistics": lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt(),
    "numbers without axes": lambda x: (
        x.sum().transpose(0, 0) + x.mean().sum(-1) + x[0, 0, 0, 0].flip(0) + x.sum().mean()
    ),
    "sign of complex numbers": lambda x: torch.view_as_real(torch.sgn(torch.complex(x, x * x))),
    "pairs at odd places": lambda x: torch.view_as_real(
        torch.view_as_complex((x.flatten()[:5] * 2)[:4].view(2, 2)) ** 2
    ),
    "a conjugate inside an operation": lambda x: torch.view_as_real(torch.linalg.pinv(torch.complex(x[0], x[1]))),
    "strides": lambda x: x.sin().as_strided((2, 3, 2), (7, 1, 36), 5) * x.flatten()[:2],
    "strides of what is expanded": lambda x: x[:1, :1, :1].expand(2, 3, 6, 6).as_strided((2, 6), (0, 1)),
    "multi-head attention": lambda x: MHA(x[:, 0], x[:, 1], x[:, 2], need_weights=False)[0],
}
MHA = nn.MultiheadAttention(6, 2, batch_first=True).double().eval()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rule_agrees_with_forward_mode(name):
    function = FUNCTIONS[name]
    x, tangents = torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.randn(4, 2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad(), isolated(None):
        value, moved = push_forward(function, x.clone(), tangents.clone())
        wanted = function(x.clone()), torch.stack([torch.func.jvp(function, (x,), (t,))[1] for t in tangents])
    assert type(value) is type(moved) is torch.Tensor
    torch.testing.assert_close(value, wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moved, wanted[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: OTHER.index_fill(1, torch.tensor([0, 2]), x.sum()),
        lambda x: OTHER[0, 0, 0, 0].index_fill(0, torch.tensor([0]), x.sum()),
        lambda x: x.sum().roll(1),
    ],
)
def test_what_vmap_of_torch_has_wrong_is_right(function):
    x, tangents = torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.randn(4, 2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        _, moved = push_forward(function, x, tangents)
        wanted = torch.stack([torch.func.jvp(function, (x,), (t,))[1] for t in tangents])
    torch.testing.assert_close(moved, wanted)


@pytest.mark.parametrize("write", [lambda y, v: v.mul_(2), lambda y, v: v[0].mul_(2), lambda y, v: y.mul_(2)])
def test_to_write_where_a_conjugate_view_is_in_use_is_refused(write):
    def function(x):
        y = torch.complex(x, x * x)
        view = y.conj()
        write(y, view)
        return torch.view_as_real(y + view)

    with torch.no_grad(), pytest.raises(Unsupported, match="conjugate"):
        push_forward(function, torch.randn(3), torch.randn(2, 3))


def test_strides_that_leave_a_tensor_are_refused():
    x, zeros = torch.randn(3, 4), torch.zeros(3, 4)
    with torch.no_grad(), pytest.raises(Unsupported, match="strides"):
        push_forward(lambda v: (v[0] + zeros)[0].as_strided((3, 4), (4, 1), 0) * 1, x, torch.randn(2, 3, 4))


def change_a_view(x):
    y = x * 2
    y[:, 0] += 1
    return y


def change_under_a_view(x):
    y = x * 2
    first = y[:, 0]
    y.add_(1)
    return first + y[:, 1]


def change_a_plain_tensor(x):
    y = torch.zeros_like(x)
    y.add_(x)
    return y


def write_out(x):
    return torch.add(x, x, out=torch.empty_like(x))


@pytest.mark.parametrize("function", [change_a_plain_tensor, write_out])
def test_shared_memory_is_refused_not_followed_wrongly(function):
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad(), pytest.raises(Unsupported):
        push_forward(function, x, torch.randn(2, 2, 3, 4, 4))


def test_what_is_written_into_a_new_tensor_is_followed():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        result = linearise(lambda v: change_a_plain_tensor(v).sin().flatten(1), x, lm.generators("rotation"))
        wanted = linearise(lambda v: v.sin().flatten(1), x, lm.generators("rotation"))
    assert result.method == "forward created"
    torch.testing.assert_close(result.lie_derivatives, wanted.lie_derivatives)


def test_detached_tensors_and_those_without_gradients_move_as_well():
    x, tangents = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        _, moved = push_forward(lambda v: v * v.detach() + v.data.sin(), x, tangents)
    torch.testing.assert_close(moved, tangents * (2 * x + x.cos()))


def test_inputs_and_tangents_are_not_changed():
    x, tangents = torch.randn(1, 2, 4, 4), torch.randn(3, 1, 2, 4, 4)
    before = x.clone(), tangents.clone()
    with torch.no_grad():
        push_forward(lambda v: F.relu(v.add_(1), inplace=True), x.clone(), tangents)
        result = linearise(lambda v: v.relu_().mul_(2).flatten(1), x, lm.generators("rotation"))
    assert result.method == "forward"
    assert torch.equal(x, before[0])
    assert torch.equal(tangents, before[1])


def test_no_tensor_outlives_the_pass():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)).eval()
    with torch.no_grad():
        push_forward(model, torch.randn(1, 2, 8, 8), torch.randn(3, 1, 2, 8, 8))
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Dual]
    assert not any(isinstance(value, Dual) for value in model.state_dict().values())


def test_the_body_of_a_custom_function_counts_not_what_it_declares():
    class Relu(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.clamp(min=0)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def jvp(ctx, t):
            return t * 3

    x = torch.randn(1, 1, 4, 4)
    with torch.no_grad():
        result = linearise(lambda v: Relu.apply(v).flatten(1), x, lm.generators("saturation"))
    torch.testing.assert_close(result.lie_derivatives[0], x.clamp(min=0).flatten(1))
