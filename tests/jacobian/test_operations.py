"""One contract for every operation that carries tangents, over a table of them.

Each is called on a tensor that moves, in each state that such a tensor may be in: with a factor that still waits, with
memory that others see, laid out otherwise. Its values, layout and tangents are held to the operation's own and to
torch's `jvp`, and so are those of every tensor that went in, which it must not have changed.
"""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from lie_metric.jacobian import carrying
from lie_metric.jacobian.carrying import Dual, wrap
from lie_metric.jacobian.memory import Tangents
from lie_metric.jacobian.pushing import Fused, push_forward
from lie_metric.jacobian.rules import arguments

SHAPE = (2, 3, 4, 4)
COUNT = 2
aten = torch.ops.aten


def fixed(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


B = fixed(*SHAPE, seed=5)
SMALL = fixed(3, 1, 1, seed=6)
W = fixed(5, 4, seed=7)
KERNEL = fixed(4, 3, 3, 2, seed=8)
GROUPED = fixed(3, 1, 2, 2, seed=9)
BIAS = fixed(4, seed=10)
MASK = fixed(4, 4, seed=11) > 0
PLACES = torch.tensor([[1, 0, 3, 2]]).expand(2, 3, 4, 4).contiguous()

# States of a tensor that moves, made of one that comes in; all that is returned has to stay as it is.
STATES = {
    "as it comes": lambda x: (x,),
    "times a number": lambda x: (x * 0.5, x),
    "times a tensor": lambda x: (x.sin(), x),
    "seen by another": lambda x: (y := x * 0.5 + 0.1, y[:], y.clone()),
    "laid out otherwise": lambda x: (x.transpose(0, 1).contiguous().transpose(0, 1), x),
    "a part": lambda x: (torch.stack([x * 2, x], -1)[..., 1], x),
    "in one place": lambda x: (x[:1].expand(*SHAPE), x),
}

# Rules that need neither `vmap` nor `jvp`.
DIRECT = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "sin": torch.sin,
    "cos": torch.cos,
    "abs": torch.abs,
    "erf": torch.erf,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu, tanh": lambda y: F.gelu(y, approximate="tanh"),
    "leaky relu": F.leaky_relu,
    "leaky relu, slope": lambda y: F.leaky_relu(y, 0.3),
    "softplus": F.softplus,
    "softplus, beta": lambda y: F.softplus(y, 3.0),
    "softplus, threshold": lambda y: F.softplus(y, 2.0, 0.5),
    "hardtanh": F.hardtanh,
    "hardtanh, bounds": lambda y: F.hardtanh(y, -0.3, 0.4),
    "relu6": F.relu6,
    "view": lambda y: y.contiguous().view(6, 4, 4),
    "unsqueeze": lambda y: y.unsqueeze(-1),
    "squeeze": lambda y: y[:1].squeeze(),
    "squeeze an axis": lambda y: y[:, :1].squeeze(1),
    "squeeze a negative axis": lambda y: y[..., :1].squeeze(-1),
    "squeeze axes": lambda y: y[:1, :1].squeeze((0, 1)),
    "reshape": lambda y: y.reshape(-1),
    "flatten": lambda y: y.flatten(1, 2),
    "unflatten": lambda y: y.unflatten(2, (2, 2)),
    "clone": torch.clone,
    "contiguous": lambda y: y.contiguous(),
    "alias": aten.alias.default,
    "to float32": lambda y: y.float(),
    "to complex": lambda y: y.to(torch.complex128),
    "to integers": lambda y: y.long(),
    "to itself": lambda y: y.to(torch.float64, copy=True),
    "channels last": lambda y: y.contiguous(memory_format=torch.channels_last),
    "positive": torch.positive,
    "conj": lambda y: (y * (1 + 2j)).conj() * 2j,
    "negative view": lambda y: (y * (1 + 2j)).conj().imag * 3,
    "as real": lambda y: torch.view_as_real(y * (1 + 2j)),
    "as real, conjugate": lambda y: torch.view_as_real((y * (1 + 2j)).conj().resolve_conj()),
    "slice": lambda y: y[1:],
    "slice, axis": lambda y: y[:, :, 1:3],
    "slice, negative": lambda y: y[..., -2:],
    "slice, step": lambda y: y[..., ::2],
    "select": lambda y: y[0],
    "select, axis": lambda y: y.select(2, 1),
    "select, negative axis": lambda y: y.select(-2, -1),
    "unbind, axis": lambda y: y.unbind(1),
    "unbind, negative axis": lambda y: y.unbind(-1),
    "split, axis": lambda y: y.split(2, 1),
    "split, negative axis": lambda y: y.split([1, 3], -1),
    "chunk": lambda y: y.chunk(2, 2),
    "transpose": lambda y: y.transpose(0, 2),
    "transpose, negative axes": lambda y: y.transpose(-1, 0),
    "mT": lambda y: y.mT,
    "diagonal, axes": lambda y: y.diagonal(1, 2, 3),
    "diagonal, negative axes": lambda y: y.diagonal(-1, -1, 0),
    "t of a matrix": lambda y: y[0, 0].t(),
    "t of a vector": lambda y: y[0, 0, 0].t(),
    "permute": lambda y: y.permute(2, 0, 3, 1),
    "permute, negative": lambda y: y.permute(-1, 1, -4, 2),
    "movedim": lambda y: y.movedim(1, -1),
    "expand": lambda y: y[:1].expand(5, 3, 4, 4),
    "expand, new axes": lambda y: y.expand(2, -1, -1, -1, -1),
    "expand a number": lambda y: y.sum().expand(2, 2),
    "mean": lambda y: y.mean(),
    "mean, axes": lambda y: y.mean((1, -1)),
    "mean, kept": lambda y: y.mean(-2, keepdim=True),
    "sum": lambda y: y.sum(),
    "sum, axis": lambda y: y.sum(0),
    "sum, negative axis": lambda y: y.sum(-1),
    "sum, kept": lambda y: y.sum((0, 2), keepdim=True),
    "sum, no axes": lambda y: y.sum(()),
    "fft": torch.fft.fft,
    "rfft": torch.fft.rfft,
    "rfft, axis": lambda y: torch.fft.rfft(y, dim=1),
    "fft2": torch.fft.fft2,
    "irfft": lambda y: torch.fft.irfft(torch.fft.rfft(y) * (1 + 1j)),
    "fft, norm": lambda y: torch.fft.fft(y, dim=-2, norm="ortho"),
    "mm": lambda y: y[0, 0] @ y[1, 1],
    "mm, fixed second": lambda y: y[0, 0] @ W.T,
    "mm, fixed first": lambda y: W @ y[0, 0],
    "bmm": lambda y: y[0] @ y[1],
    "bmm, fixed second": lambda y: y[0] @ B[0],
    "bmm, fixed first": lambda y: B[0] @ y[0],
    "bmm, one tensor": lambda y: torch.bmm(y[0], y[0]),
    "mm, one tensor": lambda y: torch.mm(y[0, 0], y[0, 0]),
    "addmm": lambda y: torch.addmm(BIAS[:1], y[0, 0], y[0, 1]),
    "baddbmm": lambda y: torch.baddbmm(B[0], y[0], y[1]),
    "addmm, fixed first": lambda y: torch.addmm(BIAS[:1], W, y[0, 1]),
    "cat": lambda y: torch.cat([y, B]),
    "cat, axis": lambda y: torch.cat([B, y, y * 2], 1),
    "cat, negative axis": lambda y: torch.cat([y, B], -1),
    "cat, empty": lambda y: torch.cat([torch.empty(0, dtype=torch.float64), y, B]),
    "cat, moving empty": lambda y: torch.cat([y.flatten()[:0], B]),
    "cat, wider type": lambda y: torch.cat([y.float(), B], 2),
    "cat, one empty": lambda y: torch.cat([y[:0], y]),
    "stack": lambda y: torch.stack([y, B]),
    "stack, axis": lambda y: torch.stack([B, y], 2),
    "stack, negative axis": lambda y: torch.stack([B, y, y], -1),
    "softmax": lambda y: y.softmax(1),
    "softmax, negative axis": lambda y: y.softmax(-1),
    "softmax of a number": lambda y: y.sum().softmax(0),
    "attention, a row masked as a whole": lambda y: F.scaled_dot_product_attention(y, y.mT, y, MASK & MASK[:, :1]),
    "safe softmax": lambda y: aten._safe_softmax(
        y.masked_fill(MASK.new_tensor([[True], [False], [False], [True]]), -math.inf), -1
    ),
    "log_softmax": lambda y: y.log_softmax(1),
    "log_softmax, negative axis": lambda y: y.log_softmax(-2),
    "max pool": lambda y: F.max_pool2d(y, 2),
    "max pool, options": lambda y: F.max_pool2d(y, 2, 1, 1, 1),
    "max pool, dilated": lambda y: F.max_pool2d(y, 2, stride=1, dilation=2),
    "max pool, ceil": lambda y: F.max_pool2d(y, 3, 2, ceil_mode=True),
    "max pool of one": lambda y: F.max_pool2d(y[0], 2),
    "max pool, 3d": lambda y: F.max_pool3d(y, 2),
    "max pool, 3d batch": lambda y: F.max_pool3d(y[None], 2),
    "as strided": lambda y: y.contiguous().as_strided((2, 3), (1, 4), 5),
    "as strided, windows": lambda y: y.contiguous().as_strided((3, 2), (1, 1), 1),
    "as strided, of a part": lambda y: y[1].clone(memory_format=torch.contiguous_format)[1].as_strided((2, 2), (4, 1)),
    "as strided, of a transpose": lambda y: y.contiguous()[0, 0].clone().t().as_strided((3, 4), (4, 1), 4),
    "pad": lambda y: F.pad(y, (1, 2)),
    "pad, value": lambda y: F.pad(y, (1, 0, 2, 1), value=3.0),
    "pad, negative": lambda y: F.pad(y, (-1, 0, 0, -2)),
    "where": lambda y: torch.where(MASK, y, B),
    "where, second": lambda y: torch.where(MASK, B, y),
    "where, both": lambda y: torch.where(MASK, y, y * 2),
    "where, number": lambda y: torch.where(MASK, y, 1.0),
    "where, wider": lambda y: torch.where(MASK[:, None, None], y[0, 0], B[0, 0]),
    "where, wider type": lambda y: torch.where(MASK, y.float(), B),
    "where, fewer axes": lambda y: torch.where(MASK, y[0, 0, 0], B),
    "masked_fill": lambda y: y.masked_fill(MASK, 0.5),
    "masked_fill, wider": lambda y: y[0, 0].masked_fill(MASK[:, None, None], 0.5),
    "add": lambda y: y + B,
    "add, reversed": lambda y: B + y,
    "add a number": lambda y: y + 2,
    "add, alpha": lambda y: torch.add(y, B, alpha=3),
    "add to fixed, alpha": lambda y: torch.add(B, y, alpha=3),
    "add, wider": lambda y: y[0, 0] + B,
    "add, smaller": lambda y: y + SMALL,
    "add, smaller moves": lambda y: B + y.mean((0, 2, 3), keepdim=True),
    "add both": lambda y: y + y.mT,
    "add both, alpha": lambda y: torch.add(y, y.mT, alpha=0.3),
    "add itself": lambda y: y + y,
    "add itself, alpha": lambda y: torch.add(y, y, alpha=0.3),
    "add a multiple": lambda y: y + y * 3,
    "add a multiple, alpha": lambda y: torch.add(y, y * 3, alpha=0.3),
    "add a function": lambda y: y + y.sin(),
    "add to a function": lambda y: y.sin() + y,
    "add functions": lambda y: y.sin() + y.cos(),
    "add functions, alpha": lambda y: torch.add(y.sin(), y.cos(), alpha=0.3),
    "add to a function, alpha": lambda y: torch.add(y.sin(), y.mT, alpha=0.3),
    "add both, wider": lambda y: y + y.mean((2, 3), keepdim=True),
    "add both, wider, alpha": lambda y: torch.add(y.mean((2, 3), keepdim=True), y, alpha=2),
    "add both, fewer axes": lambda y: y[0, 0] + y,
    "add, wider type": lambda y: y.float() + B,
    "add both, wider type": lambda y: y.float() + y,
    "add both, wider type second": lambda y: y + y.float() * 2,
    "add, wider type, alpha": lambda y: torch.add(B, y.float(), alpha=2),
    "add wide and narrow": lambda y: y.mean((2, 3), keepdim=True) + y.mean((0, 1), keepdim=True),
    "sub": lambda y: y - B,
    "sub, reversed": lambda y: B - y,
    "sub both": lambda y: y - y.mT,
    "sub itself": lambda y: y - y,
    "sub, alpha": lambda y: torch.sub(B, y, alpha=2),
    "sub a number": lambda y: y - 2,
    "sub both, alpha": lambda y: torch.sub(y, y.mT, alpha=2),
    "sub functions": lambda y: y.sin() - y.cos(),
    "sub a function": lambda y: y - y.sin(),
    "sub itself, alpha": lambda y: torch.sub(y, y, alpha=3),
    "rsub": lambda y: 1 - y,
    "mul": lambda y: y * B,
    "mul, reversed": lambda y: B * y,
    "mul by a number": lambda y: y * 3,
    "mul by a tensor number": lambda y: y * torch.tensor(3.0),
    "mul, smaller": lambda y: y * SMALL,
    "mul, wider": lambda y: y[0, 0] * B,
    "mul, wider, first fixed": lambda y: B * y[0, 0],
    "mul both": lambda y: y * y.mT,
    "mul itself": lambda y: y * y,
    "mul both, wider second": lambda y: y.mean((2, 3), keepdim=True) * y,
    "mul both, wider first": lambda y: y * y.mean((2, 3), keepdim=True),
    "mul both, fewer axes": lambda y: y * y[0, 0],
    "mul both, fewer axes first": lambda y: y[0, 0] * y,
    "mul functions": lambda y: y.sin() * y.cos(),
    "mul both ways wider": lambda y: y.mean(3, keepdim=True) * y.mean(2, keepdim=True),
    "mul, wider type": lambda y: y.float() * B,
    "mul both, wider type": lambda y: y.float() * y,
    "mul, complex": lambda y: y * (1 + 2j),
    "mul, complex tensor": lambda y: y * B.to(torch.complex128) * 1j,
    "div": lambda y: y / B,
    "div by a number": lambda y: y / 4,
    "div by a tensor number": lambda y: y / torch.tensor(4.0),
    "div, wider": lambda y: y[0, 0] / B,
    "neg": torch.neg,
    "convolution": lambda y: F.conv2d(y, KERNEL, BIAS),
    "convolution, options": lambda y: F.conv2d(y, KERNEL, None, (2, 1), (1, 2), (2, 1)),
    "convolution, groups": lambda y: F.conv2d(y, GROUPED, None, groups=3),
    "convolution, transposed": lambda y: F.conv_transpose2d(y, KERNEL.transpose(0, 1), BIAS, 2, 1, 1),
    "linear": lambda y: F.linear(y, W),
    "linear, bias": lambda y: F.linear(y, W, BIAS[[0, 1, 2, 3, 0]]),
    "linear, keywords": lambda y: F.linear(bias=BIAS[[0, 1, 2, 3, 0]], weight=W, input=y),
    "layer norm": lambda y: F.layer_norm(y, (4,)),
    "layer norm, weight": lambda y: F.layer_norm(y, (4,), BIAS, BIAS + 1, 0.1),
    "layer norm, keywords": lambda y: F.layer_norm(y, normalized_shape=[4], bias=BIAS, eps=0.2),
    "layer norm, weight alone": lambda y: F.layer_norm(y, (4,), BIAS),
    "layer norm, axes": lambda y: F.layer_norm(y, (4, 4), B[0, 0], eps=0.1),
    "attention": lambda y: F.scaled_dot_product_attention(y, y.mT, y.mT),
    "attention, lengths": lambda y: F.scaled_dot_product_attention(y[:, :, :3], y.mT, y.mT[..., :2]),
    "attention, scale": lambda y: F.scaled_dot_product_attention(y, y.mT, y, scale=0.7),
    "attention, mask": lambda y: F.scaled_dot_product_attention(y, y.mT, y, attn_mask=MASK),
    "attention, bias": lambda y: F.scaled_dot_product_attention(y, y.mT, y, B[:, :1]),
    "attention, nothing dropped": lambda y: F.scaled_dot_product_attention(y, y.mT, y, None, 0.0, False),
    "upsample": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"),
    "upsample, corners": lambda y: F.interpolate(y, size=(3, 5), mode="bilinear", align_corners=True),
    "nearest": lambda y: F.interpolate(y, size=(3, 6)),
    "average pool": lambda y: F.avg_pool2d(y, 2, 1, 1),
    "adaptive pool": lambda y: F.adaptive_avg_pool2d(y, (3, 2)),
    "pixel shuffle": lambda y: F.pixel_unshuffle(y, 2),
    "reflection": lambda y: F.pad(y, (1, 2, 0, 1), mode="reflect"),
    "replication": lambda y: F.pad(y, (1, 2, 0, 1), mode="replicate"),
    "linear upsampling": lambda y: F.interpolate(y[0], size=7, mode="linear"),
    "trilinear": lambda y: F.interpolate(y[None], size=(2, 5, 3), mode="trilinear"),
}

POSITIVE = {
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
}

# Rules that use `vmap` or `jvp`, for the one operation and all tangents.
INDIRECT = {
    "elu": F.elu,
    "elu, alpha": lambda y: F.elu(y, 0.3),
    "power": lambda y: y**3,
    "clamp": lambda y: y.clamp(-0.3, 0.5),
    "clamp below": lambda y: y.clamp(min=0.1),
    "clamp, bounds": lambda y: aten.clamp_max(aten.clamp_min(y, -0.2), 0.4),
    "expm1": torch.expm1,
    "square": torch.square,
    "atan": torch.atan,
    "threshold": lambda y: F.threshold(y, 0.2, 5.0),
    "index": lambda y: y[:, [0, 2]],
    "index by two": lambda y: y[[0, 1], :, [1, 2]],
    "index by a mask": lambda y: y[..., MASK],
    "index_select": lambda y: y.index_select(-1, torch.tensor([1, 1, 0])),
    "gather": lambda y: y.gather(2, PLACES),
    "rot90": lambda y: y.rot90(1, (2, 3)),
    "repeat": lambda y: y.repeat(2, 1, 1, 3),
    "tril": lambda y: y.tril(-1),
    "triu": lambda y: y.triu(1),
    "take": lambda y: y.take(PLACES[0, 0]),
    "trace": lambda y: y[0, 0].trace(),
    "diag_embed": lambda y: y.diag_embed(),
    "unfold": lambda y: y.unfold(2, 2, 1),
    "masked_select": lambda y: y.masked_select(MASK),
    "cumsum": lambda y: y.cumsum(1),
    "cumsum, negative axis": lambda y: y.cumsum(-1),
    "roll": lambda y: y.roll(1),
    "roll, axes": lambda y: y.roll((1, -1), (0, -1)),
    "flip": lambda y: y.flip((1, -1)),
    "take_along_dim": lambda y: y.take_along_dim(PLACES, 1 + 1),
    "as complex": lambda y: torch.view_as_complex((y * 2).view(2, 3, 8, 2).clone()),
    "unbind": lambda y: y.unbind(),
    "split": lambda y: y.split(1),
    "split, sizes": lambda y: y.split([1, 1]),
    "diagonal": lambda y: y.diagonal(),
    "upsample one": lambda y: F.pad(y[0], (1, 2, 0, 1), mode="reflect"),
    "pool one": lambda y: F.avg_pool2d(y[0], 2),
    "sine of a complex": lambda y: (y * 1j + B).sin(),
}

# Of no rule: differentiated as any operation.
ANY = {
    "power of two": lambda y: 2**y,
    "quotient": lambda y: y / (y.flip(0) ** 2 + 1),
    "a constant by it": lambda y: B / (y * y + 1),
    "maximum": lambda y: torch.maximum(y, B),
    "mean, type": lambda y: y.mean(1, dtype=torch.float64),
    "sum, wider type": lambda y: y.float().sum(1, dtype=torch.float64),
    "softmax, type": lambda y: y.float().softmax(1, dtype=torch.float64),
    "log_softmax of a number": lambda y: y.sum().log_softmax(0),
    "constants beside it": lambda y: (
        y + F.layer_norm(B, (4,)) + F.linear(B, W[:4]) + F.scaled_dot_product_attention(B, B, B)
    ),
    "moving filling": lambda y: B.masked_fill(MASK, y.sum()),
    "moving weight": lambda y: F.conv2d(B[:, :, :, :], y[..., :2]),
    "moving bias": lambda y: F.linear(B, W[:4], y[0, 0, 0]),
    "moving added": lambda y: torch.addmm(y[0, 0], W[:4], B[0, 0]),
    "addmm, beta": lambda y: torch.addmm(B[0, 0], y[0, 0], y[0, 1], beta=2, alpha=3),
    "sort": lambda y: y.sort(-1).values,
    "topk": lambda y: y.topk(2)[0],
    "var": lambda y: y.var(1),
    "attention, causal": lambda y: F.scaled_dot_product_attention(y, y.flip(0), y, is_causal=True),
    "attention of three axes": lambda y: F.scaled_dot_product_attention(y[0], y[1], y[0]),
    "attention, fixed keys": lambda y: F.scaled_dot_product_attention(y, B, y),
    "lerp": lambda y: y.lerp(y.flip(0), 0.3),
    "group norm": lambda y: F.group_norm(y, 3),
    "power of its own": lambda y: (y * y + 1) ** y,
    "clamp by a tensor": lambda y: y.clamp(B, B + 1),
    "rsub of a tensor": lambda y: torch.rsub(y, B, alpha=2),
    "div of two": lambda y: y / y.flip(0).exp(),
    "conj_physical": lambda y: torch.conj_physical(y.to(torch.complex128) * 1j),
    "linear in its weight": lambda y: F.linear(B[0, 0], y[0, 0]),
    "layer norm, moving weight": lambda y: F.layer_norm(B, (4,), y[0, 0, 0]),
    "remainder": lambda y: y % 0.7,
    "addcmul": lambda y: torch.addcmul(y, y, B, value=0.3),
    "masked mean": lambda y: aten.where(MASK.new_ones(()), y, B).mean(),
    "prod": lambda y: y.prod(1),
    "norm of another order": lambda y: torch.linalg.vector_norm(y, 1, dim=-1),
    "norm of a complex": lambda y: torch.linalg.vector_norm(y * (1 + 2j) + B * 1j, dim=1),
    "norm of a number": lambda y: torch.linalg.vector_norm(y.sum()),
    "amax of a number": lambda y: y.sum().amax(),
    "gather a number": lambda y: y[0, 0, 0].gather(0, torch.tensor(1)),
    "gather from a number": lambda y: y.sum().gather(0, torch.tensor([0, 0])),
    "cumsum of a number": lambda y: y.sum().cumsum(-1),
    "index a number": lambda y: y.sum()[torch.tensor(True)],
    "roll, no axes": lambda y: aten.roll(y, [1], []),
    "flip, no axes": lambda y: y.flip(()),
    "group norm, moving weight": lambda y: F.group_norm(B, 3, y[0, 0, 0, :3]),
    "group norm, both move": lambda y: F.group_norm(y, 3, y[0, 0, 0, :3], y[0, 0, 1, :3]),
    "attention, moving bias": lambda y: F.scaled_dot_product_attention(y, y.mT, y, y.flip(0)),
    "attention, shared keys": lambda y: F.scaled_dot_product_attention(y, y[:, :1], y[:, :1].mT),
    "rounded quotient": lambda y: torch.div(y, 0.3, rounding_mode="floor"),
}


# Rules of one kernel for all tangents, which stand above as well where they were differentiated on their own before.
AT_ONCE = {
    "unbind": lambda y: y.unbind(),
    "split": lambda y: y.split(1),
    "split, sizes": lambda y: y.split([1, 1]),
    "diagonal": lambda y: y.diagonal(),
    "index": lambda y: y[:, [0, 2]],
    "index by two": lambda y: y[:, [0, 1], [1, 2]],
    "index by a mask": lambda y: y[..., MASK],
    "index by a mask, first": lambda y: y[0, 0][MASK],
    "index by a number": lambda y: y[torch.tensor(1)],
    "index_select": lambda y: y.index_select(-1, torch.tensor([1, 1, 0])),
    "gather": lambda y: y.gather(2, PLACES),
    "gather, fewer": lambda y: y.gather(-1, PLACES[:1, :2]),
    "take_along_dim": lambda y: y.gather(1, PLACES[:, :, :2].clamp(max=2)),
    "repeat": lambda y: y.repeat(2, 1, 1, 3),
    "repeat, more axes": lambda y: y[0, 0].repeat(2, 3, 1),
    "tril": lambda y: y.tril(-1),
    "triu": lambda y: y.triu(1),
    "unfold": lambda y: y.unfold(2, 2, 1),
    "cumsum": lambda y: y.cumsum(1),
    "cumsum, negative axis": lambda y: y.cumsum(-1),
    "cumsum, wider type": lambda y: y.float().cumsum(1, dtype=torch.float64),
    "roll, axes": lambda y: y.roll((1, -1), (0, -1)),
    "flip": lambda y: y.flip((1, -1)),
    "power": lambda y: y**3,
    "power of zero": lambda y: y**0,
    "power of one": lambda y: y.pow(1),
    "square": torch.square,
    "clamp": lambda y: y.clamp(-0.3, 0.5),
    "clamp below": lambda y: y.clamp(min=0.1),
    "clamp, bounds": lambda y: aten.clamp_max(aten.clamp_min(y, -0.2), 0.4),
    "expm1": torch.expm1,
    "log1p": lambda y: (y * y).log1p(),
    "group norm": lambda y: F.group_norm(y, 3),
    "group norm, weight": lambda y: F.group_norm(y, 1, BIAS[:3], BIAS[1:], 0.1),
    "group norm, positions": lambda y: F.group_norm(y[0], 2, B[0, 0, 0], None),
    "norm": lambda y: y.norm(dim=-1),
    "norm, kept": lambda y: torch.linalg.vector_norm(y, dim=(1, -2), keepdim=True),
    "norm of all": lambda y: torch.linalg.vector_norm(y),
    "normalize": lambda y: F.normalize(y, dim=1),
    "amax": lambda y: y.amax(1),
    "amax, kept": lambda y: y.amax((0, -1), keepdim=True),
    "amax of all": lambda y: y.amax(),
    "amin": lambda y: y.amin(-1),
    "amax, equal": lambda y: torch.cat([y, y]).amax(0),
    "quotient": lambda y: y / (y.flip(0) ** 2 + 1),
    "quotient, wider": lambda y: y[0, 0] / (y**2 + 1),
    "quotient, wider divisor": lambda y: y / (y**2 + 1).mean(1, keepdim=True),
    "a constant by it": lambda y: B / (y * y + 1),
    "quotient, divisor of fewer axes": lambda y: y / (y[0, 0] ** 2 + 1),
    "a constant by fewer axes": lambda y: B / (y[0, 0] ** 2 + 1),
    "a number by it": lambda y: 2 / (y * y + 1),
    "quotient, wider type": lambda y: y / (y.float() ** 2 + 1),
}


def steady(like):
    return torch.linspace(-1, 1, like.numel(), dtype=torch.float64).reshape(like.shape)


def alone(change):
    """A change in place of a tensor of its own."""

    def function(y):
        z = y * 1.5 + y.flip(0)
        change(z, y)
        return z

    return function


def in_view(change):
    """A change in place that others see."""

    def function(y):
        z = y * 1.5 + y.flip(0)
        first, whole = z[:, 0], z.view(-1)
        change(z[..., 1:3], y[..., 1:3])
        return z, first, whole, first * 2

    return function


def laid_out_otherwise(change):
    """A change in place of a tensor that no other sees, and that is not laid out as results are."""

    def function(y):
        z = y.contiguous().transpose(-1, 1).transpose(0, 2) * 1.5  # a product is laid out as its factor
        assert not z.is_contiguous()
        change(z, y.transpose(-1, 1).transpose(0, 2).contiguous())
        return z, z[0]

    return function


CHANGES = {
    "add_": lambda z, y: z.add_(y),
    "add_, alpha": lambda z, y: z.add_(y, alpha=0.3),
    "add_ a function": lambda z, y: z.add_(y.sin()),
    "add_ a function, alpha": lambda z, y: z.add_(y.cos(), alpha=0.3),
    "add_ a multiple": lambda z, y: z.add_(y * 3),
    "add_ a number": lambda z, y: z.add_(1),
    "add_ fixed": lambda z, y: z.add_(steady(z)),
    "add_ smaller": lambda z, y: z.add_(y.mean(0)),
    "add_ narrower": lambda z, y: z.add_(y.float()),
    "add_ itself": lambda z, y: z.sin_().add_(z.clone()),
    "sub_": lambda z, y: z.sub_(y),
    "sub_, alpha": lambda z, y: z.sub_(y, alpha=2),
    "sub_ a function": lambda z, y: z.sub_(y.sin()),
    "sub_ to a function": lambda z, y: z.sin_().sub_(y.cos()),
    "add_ to a function": lambda z, y: z.sin_().add_(y),
    "add_ both functions": lambda z, y: z.cos_().add_(y.sin()),
    "mul_": lambda z, y: z.mul_(y),
    "mul_ a number": lambda z, y: z.mul_(3),
    "mul_ smaller": lambda z, y: z.mul_(y.mean(0)),
    "div_": lambda z, y: z.div_(3),
    "sin_": lambda z, y: z.sin_(),
    "neg_": lambda z, y: z.neg_(),
    "clamp_": lambda z, y: z.clamp_(-0.4, 0.6),
    "fill_": lambda z, y: z.fill_(0.3),
    "zero_": lambda z, y: z.zero_(),
    "copy_": lambda z, y: z.copy_(y),
    "copy_ smaller": lambda z, y: z.copy_(y[:1]),
    "copy_ fewer axes": lambda z, y: z.copy_(y[0, 0]),
    "copy_ fixed": lambda z, y: z.copy_(steady(z)),
    "copy_ narrower": lambda z, y: z.copy_(y.float()),
    "masked_fill_": lambda z, y: z.masked_fill_(z > 0.1, 0.2),
    "row": lambda z, y: z.__setitem__(0, y[1]),
    "copy_, then a part": lambda z, y: z.copy_(y)[0].add_(1),
    "clip_, then a part": lambda z, y: z.relu_()[0].mul_(2),
    "views of views": lambda z, y: z[0][1:].mul_(y[1, 1:]),
    "twice": lambda z, y: z.add_(y).mul_(2).add_(y),
    "index_add_": lambda z, y: z.index_add_(0, torch.arange(len(y)).flip(0), y),
    "cumsum_": lambda z, y: z.cumsum_(0),
    "square_": lambda z, y: z.square_(),
    "relu_": lambda z, y: F.relu(z, inplace=True),
}


@pytest.fixture(autouse=True)
def _conditions():
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def start(positive=False, dtype=torch.float64):
    x = fixed(*SHAPE, seed=1)
    x = x.abs().clamp(0.3, 2.5) if positive else x
    return x.to(dtype), fixed(COUNT, *SHAPE, seed=2).to(dtype)


def hold(function, x, tangents, tolerance=1e-10):
    """A function's tensors and their tangents against torch's own."""
    want = [torch.func.jvp(lambda v: tuple(tree_leaves(function(v))), (x,), (t,)) for t in tangents]
    given = x.clone(), tangents.clone()
    moving = Tangents(given[1])
    moving.sharing.append(lambda: given)
    with Fused():
        found = tree_leaves(function(wrap(given[0], moving)))
    assert len(found) == len(want[0][0])
    for index, result in enumerate(found):
        value, moved = want[0][0][index], torch.stack([products[index] for _, products in want])
        told = result.value if isinstance(result, Dual) else result
        assert told.dtype == value.dtype
        assert result.shape == told.shape == value.shape
        assert result.stride() == told.stride()
        torch.testing.assert_close(told.resolve_conj(), value.resolve_conj(), rtol=tolerance, atol=tolerance)
        if isinstance(result, Dual):
            products = result.tangents
            assert products.dtype == value.dtype
            moved = moved.to(value.dtype)
            assert products.shape == moved.shape
            torch.testing.assert_close(products, moved.resolve_conj().resolve_neg(), rtol=tolerance, atol=tolerance)
        else:
            assert not moved.any()
    assert torch.equal(given[1], tangents)
    return found


def in_states(function, states=tuple(STATES)):
    """A function of a tensor in each state, and all tensors that went in, which have to stay as they are."""

    def made(x):
        found = []
        for state in states:
            y, *others = STATES[state](x)
            found += [function(y), y, *others]
        return found

    return made


def ways(function, x, tangents, monkeypatch):
    """Which of the ways that are slower than a rule are gone."""
    used = set()
    for where, name in ((carrying, "any_operation"), (torch, "vmap"), (torch.func, "jvp")):
        told = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *a, told=told, name=name, **k: (used.add(name), told(*a, **k))[1])
    monkeypatch.setattr(carrying, "_TABLE", {})
    with Fused():
        function(wrap(x, tangents))
    return used


def tolerance_of(name):
    return 1e-5 if "type" in name or "float32" in name or "narrower" in name else 1e-10


@pytest.mark.parametrize("name", [*DIRECT, *POSITIVE])
def test_operations_by_rules_of_their_own(name, monkeypatch):
    function = (DIRECT | POSITIVE)[name]
    x, tangents = start(name in POSITIVE)
    hold(in_states(function, tuple(STATES)[: 3 if name in POSITIVE else None]), x, tangents, tolerance_of(name))
    assert not ways(function, x, tangents, monkeypatch), "a rule is left out"


@pytest.mark.parametrize("name", AT_ONCE)
def test_operations_for_all_tangents_at_once(name, monkeypatch):
    x, tangents = start()
    hold(in_states(AT_ONCE[name]), x, tangents, tolerance_of(name))
    assert not ways(AT_ONCE[name], x, tangents, monkeypatch), "a rule is left out"


@pytest.mark.parametrize("name", [name for name in AT_ONCE if "type" not in name])
def test_operations_against_central_differences(name):
    x, tangents = start()
    found = tree_leaves(AT_ONCE[name](wrap(x, tangents.clone())))
    for index, result in enumerate(found):
        for tangent, product in zip(tangents, result.tangents, strict=True):
            ahead, behind = (tree_leaves(AT_ONCE[name](x + h * tangent))[index] for h in (1e-6, -1e-6))
            torch.testing.assert_close(product, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-6)


# Where a rule has a case of its own: zeros, bounds, equal numbers, rows that are masked as a whole.
EDGES = {
    "norm at rest": lambda y: torch.linalg.vector_norm(y, dim=-1),
    "power of zero": lambda y: y**0,
    "power of one": lambda y: y**1,
    "clamp": lambda y: y.clamp(-0.3, 0.5),
    "clamp below": lambda y: y.clamp(min=-0.3),
    "clamp above": lambda y: y.clamp(max=0.5),
    "clamp by a tensor": lambda y: y.clamp(torch.tensor(-0.3, dtype=torch.float64)),
    "amax": lambda y: y.amax(-1),
    "amin of all": lambda y: (y * y).amin(),
    "relu": F.relu,
    "abs": torch.abs,
}


@pytest.mark.parametrize("name", EDGES)
def test_operations_where_they_have_edges(name):
    x, tangents = start()
    x[0, 0], x[0, 1], x[1, 2] = 0.0, 0.5, -0.3
    hold(EDGES[name], x, tangents)


SHARED = [name for name in DIRECT if "softmax" in name or "attention" in name or "layer norm" in name]


@pytest.mark.parametrize("name", [*SHARED, "group norm", "group norm, weight"])
def test_large_tensors_one_tangent_after_the_other(name, monkeypatch):
    function, (x, tangents) = (DIRECT | AT_ONCE)[name], start()
    with Fused():
        together = tree_leaves(function(wrap(x, tangents.clone())))
    monkeypatch.setattr(arguments, "_FEW", 0)
    hold(in_states(function), x, tangents)
    with Fused():
        apart = tree_leaves(function(wrap(x, tangents.clone())))
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one.tangents, other.tangents)


EMPTY = {
    "layer norm": lambda y: F.layer_norm(y, (4,)),
    "softmax": lambda y: y.softmax(-1),
    "attention": lambda y: F.scaled_dot_product_attention(y, y, y),
    "norm": lambda y: y.norm(dim=-1),
    "quotient": lambda y: y / (y * y + 1),
    "index": lambda y: y[:, [0, 2]],
    "gather": lambda y: y.gather(2, PLACES[: len(y)]),
    "flip": lambda y: y.flip(0),
    "cumsum": lambda y: y.cumsum(0),
    "repeat": lambda y: y.repeat(2, 1, 1, 1),
    "no positions": lambda y: F.scaled_dot_product_attention(y[:, :, :0], y, y),
    "no entries": lambda y: y[:, [], :],
    "power": lambda y: y**2,
    "group norm": lambda y: F.group_norm(y, 3),
}


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("name", EMPTY)
def test_tensors_without_entries(name, images):
    x, tangents = start()
    hold(EMPTY[name], x[:images], tangents[:, :images])


@pytest.mark.parametrize("name", INDIRECT)
def test_operations_by_one_derivative_or_one_map(name, monkeypatch):
    x, tangents = start()
    hold(in_states(INDIRECT[name]), x, tangents)
    assert "any_operation" not in ways(INDIRECT[name], x, tangents, monkeypatch) or name == "sine of a complex"


@pytest.mark.parametrize("name", ANY)
def test_operations_without_a_rule(name):
    x, tangents = start()
    hold(in_states(ANY[name], ("as it comes", "times a tensor", "in one place")), x, tangents, tolerance_of(name))


@pytest.mark.parametrize("how", [alone, in_view, laid_out_otherwise])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_in_place(name, how):
    x, tangents = start()
    states = ("as it comes", "times a tensor", "seen by another")
    hold(in_states(how(CHANGES[name]), states), x, tangents, tolerance_of(name))


def parts_of_a_transpose(y):
    z = (y * 2)[0, 0]
    turned, same = z.t(), z[0].t()
    turned[0].mul_(3)
    same.add_(y[0, 1, 0])
    return z, turned, same


def test_changes_through_a_transpose():
    x, tangents = start()
    hold(in_states(parts_of_a_transpose, ("as it comes", "times a tensor")), x, tangents)


def backward(function):
    """The gradient of a function, taken inside: a backward pass is an operation that moves too."""

    def gradient(x):
        with torch.enable_grad():
            again = x.requires_grad
            y = x * 1.0 if again else x.clone().requires_grad_()
            (found,) = torch.autograd.grad(function(y).sin().sum(), y, create_graph=again)
        return found

    return gradient


BACKWARD = {
    "silu": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "gelu, tanh": lambda y: F.gelu(y, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softplus, threshold": lambda y: F.softplus(y, 2.0, 0.5),
    "elu": F.elu,
    "celu": F.celu,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky relu": F.leaky_relu,
    "logsigmoid": F.logsigmoid,
    "glu": lambda y: F.glu(y, -1),
    "softmax": lambda y: y.softmax(-1),
    "log_softmax": lambda y: y.log_softmax(1),
    "layer norm": lambda y: F.layer_norm(y, (4,)),
    "layer norm, weight": lambda y: F.layer_norm(y, (4,), BIAS, BIAS + 1, 0.1),
    "group norm": lambda y: F.group_norm(y, 3),
    "rms norm": lambda y: F.rms_norm(y, (4,)),
    "instance norm": F.instance_norm,
    "convolution": lambda y: F.conv2d(y, KERNEL, BIAS),
    "linear": lambda y: F.linear(y, W),
    "average pool": lambda y: F.avg_pool2d(y, 2),
    "max pool": lambda y: F.max_pool2d(y, 2),
    "attention": lambda y: F.scaled_dot_product_attention(y, y.mT, y),
    "norm": lambda y: y.norm(dim=-1),
    "index": lambda y: y[:, [0, 2, 2]],
    "cumsum": lambda y: y.cumsum(1),
    "masked scatter": lambda y: B.masked_scatter(MASK, y * 2),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_passes(name):
    x, gradient = fixed(*SHAPE), backward(BACKWARD[name])
    tangents = fixed(COUNT, *SHAPE, seed=3)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        value, found = push_forward(gradient, x, tangents)
        assert not found.requires_grad
    with sdpa_kernel(SDPBackend.MATH):
        for tangent, product in zip(tangents, found.detach(), strict=True):
            leaf = x.clone().requires_grad_()
            wanted = gradient(leaf)
            # The Hessian is symmetric.
            (turned,) = torch.autograd.grad(wanted, leaf, tangent)
            torch.testing.assert_close(product, turned)
            torch.testing.assert_close(value.detach(), wanted.detach())


SPARSE = torch.sparse_coo_tensor([[0, 1, 1, 4], [2, 0, 3, 1]], fixed(4, seed=12), (5, 4), check_invariants=True)
TOGETHER = {
    "masked scatter": lambda y: y.masked_scatter(MASK, y.flip(0)),
    "masked scatter into fixed": lambda y: B.masked_scatter(MASK, y),
    "masked scatter of fixed": lambda y: y.masked_scatter(MASK, B),
    "masked scatter, backward": lambda y: aten.masked_scatter_backward(y, MASK.expand(SHAPE), [6, 8]),
    "sparse matrix": lambda y: torch.sparse.mm(SPARSE, y[0, 0]),
    "sparse matrix, of rows": lambda y: SPARSE.to_sparse_csr() @ y[0, 0],
    "sparse matrix, added": lambda y: torch.sparse.addmm(B[0, 0, :1].expand(5, 4), SPARSE, y[0, 0], beta=2, alpha=3),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_linear_operations_that_torch_has_no_forward_rule_of(name):
    x, tangents, operation = fixed(*SHAPE), fixed(COUNT, *SHAPE, seed=3), TOGETHER[name]
    with torch.no_grad():
        value, found = push_forward(operation, x, tangents)
        torch.testing.assert_close(value, operation(x))
        for tangent, product in zip(tangents, found, strict=True):
            torch.testing.assert_close(product, (operation(x + tangent) - operation(x - tangent)) / 2)
