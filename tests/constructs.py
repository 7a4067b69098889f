"""What users put into models, one construct a row: seeded float64 models that a measurement must get right or refuse.

Each stands beside a residual wherever that is possible, so that a derivative lost on the way changes the number instead
of making it zero. Libraries are imported by the rows that need them.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["ROWS", "Row"]


@dataclass(frozen=True)
class Row:
    """One construct.

    Attributes:
        name: What it is.
        build: Makes the model: a module, or a callable and the modules that it hides.
        wanted: "right"; "refused", where no derivative can be had; or "either", where the function jumps.
        shape: Of the images.
        output: The tensor of what the model returns.
        needs: A library that is imported, or the row is skipped.
    """

    name: str
    build: Callable[[], Any]
    wanted: str
    shape: tuple[int, ...]
    output: Any
    needs: str | None


ROWS: dict[str, Row] = {}


def row(name, wanted="right", shape=(2, 3, 8, 8), output="logits", needs=None):
    """Enters a model that the decorated function builds."""

    def enter(build):
        assert name not in ROWS, name
        ROWS[name] = Row(name, build, wanted, shape, output, needs)
        return build

    return enter


class Beside(nn.Module):
    """A branch between two convolutions, beside a residual."""

    def __init__(self, branch):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.branch = branch
        self.head = nn.Conv2d(4, 2, 3)

    def forward(self, x):
        y = torch.tanh(self.stem(x))
        return self.head(y + self.branch(y))


def beside(name, branch=None, **options):
    """Enters a branch of (B, 4, H, W): itself, or what the decorated function builds."""
    if branch is not None:
        row(name, **options)(lambda: Beside(branch))
        return None

    def enter(build):
        row(name, **options)(lambda: Beside(build()))
        return build

    return enter


def noise(*shape, seed=0, complex_=False):
    """Fixed numbers; complex ones too."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.complex128 if complex_ else torch.float64)


class Branch(nn.Module):
    """Modules by name and a function of them and the input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def tokens(function):
    """A function of (B, N, C) as one of images."""
    return lambda x: function(x.flatten(2).mT).mT.reshape(x.shape)


# ---- Fourier transforms and complex numbers -------------------------------------------------------------------------

_FILTER = noise(4, 8, 5, complex_=True)


beside("fft: filter beside a residual", lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * _FILTER, s=x.shape[-2:]))
beside("fft: times three", lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 3))
beside("fft: phase alone", lambda x: torch.fft.ifft2(torch.exp(1j * torch.fft.fft2(x).angle())).real)
beside("fft: low pass by index assignment", lambda x: _low_pass(x))
beside("fft: full with shift", lambda x: torch.fft.ifftn(torch.fft.fftshift(torch.fft.fftn(x, dim=(2, 3))) * 1j).real)
beside("fft: hfft and ihfft", lambda x: torch.fft.hfft(torch.fft.ihfft(x) * _FILTER[:, :1, :5], n=8))
beside("fft: stft and istft", lambda x: _stft(x))
beside("complex: polar, view_as_real", lambda x: torch.view_as_real(torch.polar(1 + x**2, x)).sum(-1))
beside("complex: magnitude of a product", lambda x: (torch.complex(x, x.roll(1, 2)) * (1 + 2j)).abs())
beside("complex: einsum", lambda x: torch.einsum("bchw,cd->bdhw", x.to(torch.complex128), _FILTER[:, :4, 0]).imag)
beside("complex: matmul and conj", lambda x: (lambda z: (z @ z.mH).real)(torch.complex(x, x.mT)))


def _low_pass(x):
    spectrum = torch.fft.rfft2(x)
    spectrum[..., 3:5, :] = 0
    spectrum[..., 0, 0] *= 2j
    return torch.fft.irfft2(spectrum)


def _stft(x):
    window = torch.hann_window(8, dtype=x.dtype)
    spectrum = torch.stft(x.flatten(0, 1).flatten(1), 8, 2, window=window, return_complex=True)
    return torch.istft(spectrum * _FILTER[0, 0, :, None], 8, 2, window=window, length=64).reshape(x.shape)


class GlobalFilterBlock(nn.Module):
    """A block of GFNet (Rao et al. 2021): norm, a learned filter in the spectrum, norm, perceptron."""

    def __init__(self, dim=4, size=8):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.weight = nn.Parameter(torch.randn(size, size // 2 + 1, dim, 2, dtype=torch.float64))
        self.mlp = nn.Sequential(nn.Linear(dim, 8), nn.GELU(), nn.Linear(8, dim))

    def forward(self, x):
        y = self.norm(x.permute(0, 2, 3, 1))
        y = torch.fft.rfft2(y, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.weight)
        y = torch.fft.irfft2(y, s=x.shape[-2:], dim=(1, 2), norm="ortho")
        return self.mlp(self.norm2(y)).permute(0, 3, 1, 2)


class Spectrum(nn.Module):
    """A convolutional branch and one of the spectrum, added as logits."""

    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(36, 3))
        self.spectrum = nn.Linear(3 * 40, 3)

    def forward(self, x):
        power = torch.fft.rfft2(x).abs().square().add(1).log()
        return self.cnn(x) + self.spectrum(power.flatten(1))


class FourierMixing(nn.Module):
    """Adaptive Fourier neural operator (Guibas et al. 2022): blocks of complex weights, soft shrinkage."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(2, 2, 2, 2, seed=3))

    def forward(self, x):
        z = torch.fft.rfft2(x, norm="ortho")
        z = z.reshape(len(x), 2, 2, *z.shape[2:])
        real = torch.einsum("bgihw,gij->bgjhw", z.real, self.weight[0]) - torch.einsum(
            "bgihw,gij->bgjhw", z.imag, self.weight[1]
        )
        imaginary = torch.einsum("bgihw,gij->bgjhw", z.imag, self.weight[0])
        both = F.softshrink(torch.stack([real, imaginary], -1), 0.01)
        return torch.fft.irfft2(torch.view_as_complex(both).flatten(1, 2), s=x.shape[-2:], norm="ortho")


beside("fft: GFNet block")(GlobalFilterBlock)
row("fft: spectrum branch beside a CNN")(Spectrum)
beside("fft: AFNO block")(FourierMixing)


# ---- Operators of torchvision ---------------------------------------------------------------------------------------


@beside("torchvision: DeformConv2d", needs="torchvision")
def _():
    from torchvision.ops import DeformConv2d

    return Branch(
        lambda self, x: self.deform(x, self.offset(x), self.mask(x).sigmoid()),
        deform=DeformConv2d(4, 4, 3, padding=1),
        offset=nn.Conv2d(4, 18, 3, padding=1),
        mask=nn.Conv2d(4, 9, 3, padding=1),
    )


_BOXES = torch.tensor([[0, 0.3, 0.6, 6.2, 7.1], [1, 1.1, 0.2, 5.7, 6.9]], dtype=torch.float64)


def _pooled(name, pool):
    @beside(f"torchvision: {name}", needs="torchvision")
    def _():
        import torchvision.ops

        return lambda x: F.interpolate(pool(torchvision.ops)(x), (8, 8)).expand_as(x)


_pooled("roi_align", lambda ops: lambda x: ops.roi_align(x, _BOXES, 4, sampling_ratio=2))
_pooled("roi_pool", lambda ops: lambda x: ops.roi_pool(x, _BOXES, 4))
_pooled("ps_roi_align", lambda ops: lambda x: ops.ps_roi_align(x, _BOXES, 2, sampling_ratio=2))
_pooled("ps_roi_pool", lambda ops: lambda x: ops.ps_roi_pool(x, _BOXES, 2))


@row("torchvision: feature pyramid", output=lambda levels: levels["fine"], needs="torchvision")
def _():
    from collections import OrderedDict

    from torchvision.ops import FeaturePyramidNetwork

    return Branch(
        lambda self, x: (lambda y: self.fpn(OrderedDict(fine=y, coarse=self.down(y))))(self.stem(x)),
        stem=nn.Conv2d(3, 4, 3, padding=1),
        down=nn.Conv2d(4, 6, 3, 2, 1),
        fpn=FeaturePyramidNetwork([4, 6], 5),
    )


@row("torchvision: Swin", needs="torchvision")
def _():
    from torchvision.models import SwinTransformer

    return SwinTransformer([2, 2], 8, [2], [2], [2, 2], num_classes=3)


@row("torchvision: Swin v2", needs="torchvision")
def _():
    from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlockV2

    return SwinTransformer([2, 2], 8, [2], [2], [2, 2], num_classes=3, block=SwinTransformerBlockV2)


@row("torchvision: MaxViT", shape=(1, 3, 16, 16), needs="torchvision")
def _():
    from torchvision.models import MaxVit

    return MaxVit((16, 16), 8, 2, [8], [1], 4, 0.0, num_classes=3)


@row("torchvision: vision transformer", needs="torchvision")
def _():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3)
    nn.init.normal_(model.heads.head.weight)
    return model


@row("torchvision: ConvNeXt", shape=(1, 3, 8, 8), needs="torchvision")
def _():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, None, 2)], num_classes=3, layer_scale=1.0)


@row("torchvision: segmentation with auxiliary head", needs="torchvision")
def _():
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(True), nn.Conv2d(8, 8, 3, 2, 1))
    body = IntermediateLayerGetter(backbone, {"1": "aux", "2": "out"})
    return FCN(body, FCNHead(8, 3), FCNHead(8, 3))


@row("torchvision: ResNet with bottlenecks", shape=(1, 3, 16, 16), needs="torchvision")
def _():
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3, width_per_group=8)


@row("torchvision: squeeze and excitation, stochastic depth", needs="torchvision")
def _():
    from torchvision.ops import SqueezeExcitation, StochasticDepth

    return Beside(nn.Sequential(SqueezeExcitation(4, 2), StochasticDepth(0.5, "row")))


# ---- Code beneath torch functions -----------------------------------------------------------------------------------


@torch.library.custom_op("lie_metric_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    """An operator of one's own."""
    return torch.from_numpy(x.detach().numpy() ** 3)


@cube.register_fake
def _(x):
    return torch.empty_like(x)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


cube.register_autograd(lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g, setup_context=_keep)


@torch.library.custom_op("lie_metric_tests::bare", mutates_args=())
def bare(x: torch.Tensor) -> torch.Tensor:
    """An operator without a derivative."""
    return torch.from_numpy(x.detach().numpy() ** 3)


beside("custom operator with register_autograd", lambda x: cube(x))
beside("custom operator without derivative", lambda x: bare(x), wanted="refused")


def _swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.5 * x) + torch.relu(x - 0.1)


@beside("jit: scripted function")
def _():
    return torch.jit.script(_swish)


@beside("jit: traced function")
def _():
    return torch.jit.trace(_swish, torch.randn(2, 4, 8, 8, dtype=torch.float64))


@beside("jit: scripted module")
def _():
    return torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU()).double())


@beside("jit: traced module")
def _():
    body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU()).double()
    return torch.jit.trace(body, torch.randn(2, 4, 8, 8, dtype=torch.float64))


beside("jit: fork and wait", lambda x: torch.jit.wait(torch.jit.fork(torch.sin, x * 2)))


@beside("threads in forward")
def _():
    def run(x):
        with ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(lambda k: torch.sin(k * x), (1.0, 2.0)))
        return parts[0] * parts[1]

    return run


@beside("compiled module")
def _():
    return torch.compile(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU()), backend="eager")


beside("vmap in forward", lambda x: torch.vmap(lambda one: torch.sin(one) * one.mean())(x))
beside("vmap over vmap", lambda x: torch.vmap(torch.vmap(lambda one: torch.softmax(one, -1) @ one))(x))
beside("func.grad in forward", lambda x: torch.func.grad(lambda y: (y.sin() * y).sum())(x))
beside("func.jvp in forward", lambda x: torch.func.jvp(torch.sin, (x,), (x * x,))[1])
# Torch has the derivative of this derivative wrong, without a word: it takes the LU factors for constants.
beside(
    "func.jvp of linalg.solve in forward",
    lambda x: torch.func.jvp(lambda y: torch.linalg.solve(_square(y), y), (x,), (x * x,))[1],
    wanted="refused",
)
beside("func.vjp in forward", lambda x: (lambda y, pull: pull(y)[0])(*torch.func.vjp(torch.sin, x)))
beside("func.jacrev in forward", lambda x: torch.vmap(torch.func.jacrev(lambda y: y.square().mean((1, 2))))(x).sum(1))
# It folds into constants what it is given.
beside("func.linearize in forward", lambda x: torch.func.linearize(torch.sin, x)[1](x), wanted="either")
beside("forward_ad in forward", lambda x: _dual_number(x))
beside("as_subclass(Tensor)", lambda x: torch.sin(x.as_subclass(torch.Tensor)) * x)
beside("nn.Parameter of the input", lambda x: nn.Parameter(x, requires_grad=False).sin())
beside("torch.tensor of the input", lambda x: x.clone().detach().requires_grad_(False).cos())


def _dual_number(x):
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(torch.sin(forward_ad.make_dual(x, x * x))).tangent.clone()


@beside("autograd.grad in forward, create_graph")
def _():
    def force(x):
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            energy = (point.sin() * point).sum()
            return torch.autograd.grad(energy, point, create_graph=True)[0]

    return force


@beside("autograd.grad in forward, of a detached tensor")
def _():
    def force(x):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            return torch.autograd.grad((point.sin() * point).sum(), point)[0].detach()

    return force


class MetaTensor(torch.Tensor):
    """A tensor with metadata, made as MONAI makes it: every result is one again."""

    @staticmethod
    def __new__(cls, x, meta=None):
        found = torch.as_tensor(x).as_subclass(cls)
        found.meta = dict(meta or {})
        return found

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, MetaTensor):
            result.meta = next((a.meta for a in args if isinstance(a, MetaTensor) and hasattr(a, "meta")), {})
        return result

    def as_tensor(self):
        return self.as_subclass(torch.Tensor)


beside("subclass with metadata", lambda x: (MetaTensor(x, {"spacing": 2}).sin() * 2).as_tensor())
beside("subclass that stays on", lambda x: F.avg_pool2d(MetaTensor(x), 3, 1, 1) * MetaTensor(x))


# ---- Random operations that are active in evaluation ----------------------------------------------------------------

beside("random: dropout in evaluation", lambda x: F.dropout(x, 0.5, training=True))
beside("random: dropout2d in evaluation", lambda x: F.dropout2d(x, 0.5, training=True))
beside("random: alpha dropout in evaluation", lambda x: F.alpha_dropout(x, 0.3, training=True))
beside("random: gumbel_softmax", lambda x: F.gumbel_softmax(x, tau=0.7, dim=1))
beside("random: attention with dropout", tokens(lambda t: F.scaled_dot_product_attention(t, t, t, dropout_p=0.4)))
beside("random: noise times input", lambda x: x * torch.randn_like(x))
beside("random: noise from torch.rand", lambda x: x**2 * torch.rand(x.shape, dtype=x.dtype))
beside("random: bernoulli of a probability", lambda x: x**2 * torch.bernoulli(torch.full_like(x, 0.5)))
# torch draws for negative entries alone: a change of sign shifts all draws that follow.
beside("random: rrelu in evaluation", lambda x: F.rrelu(x, training=True), wanted="either")
beside("random: fractional max pooling", lambda x: F.interpolate(F.fractional_max_pool2d(x, 2, 4), (8, 8)))
beside("random: permutation of tokens", lambda x: x.flatten(2)[..., torch.randperm(64)].reshape(x.shape) * x)
beside("random: numpy noise", lambda x: x * _numpy_noise(x))


def _numpy_noise(x):
    import numpy as np

    return torch.from_numpy(np.random.rand(*x.shape))  # noqa: NPY002


# ---- Where autograd's derivative is not the function's --------------------------------------------------------------


@beside("straight-through vector quantisation", wanted="either")
def _():
    codes = noise(6, 4, seed=5)

    def quantise(x):
        flat = x.permute(0, 2, 3, 1)
        nearest = codes[torch.cdist(flat.flatten(0, 2), codes).argmin(1)].view(flat.shape)
        return (flat + (nearest - flat).detach()).permute(0, 3, 1, 2)

    return quantise


beside("straight-through sign", lambda x: x + (x.sign() - x).detach(), wanted="either")
beside("straight-through rounding", lambda x: x + ((x * 3).round() / 3 - x).detach(), wanted="either")
beside("straight-through gumbel_softmax", lambda x: F.gumbel_softmax(x, dim=1, hard=True), wanted="either")
beside("partial detach", lambda x: x.sin() * x.detach())
beside("detached statistics", lambda x: (x - x.detach().mean((2, 3), keepdim=True)) / x.detach().std())
beside("tensor.data", lambda x: x.data.sin() * x)
row("detached input branch")(lambda: Branch(lambda self, x: self.a(x) + self.b(x.detach()).sin(), a=_conv(), b=_conv()))


def _conv():
    return nn.Conv2d(3, 4, 3, padding=1)


row("input changed in place")(lambda: Branch(lambda self, x: self.a(x.sub_(0.3).mul_(2)).sin(), a=_conv()))


@row("branch under no_grad")
def _():
    def forward(self, x):
        with torch.no_grad():
            frozen = self.backbone(x).tanh()
        return self.head(frozen) + self.head(x)

    return Branch(forward, backbone=nn.Conv2d(3, 3, 3, padding=1), head=_conv())


@row("branch under inference_mode", wanted="either")
def _():
    def forward(self, x):
        with torch.inference_mode():
            frozen = self.backbone(x).tanh()
        return self.head(frozen.clone()) + self.head(x)

    return Branch(forward, backbone=nn.Conv2d(3, 3, 3, padding=1), head=_conv())


@row("decorated by no_grad, beside a residual")
def _():
    frozen = torch.no_grad()(lambda self, x: self.b(x).sin())
    return Branch(lambda self, x: self.a(x) + frozen(self, x), a=_conv(), b=_conv())


# ---- What leaves torch ----------------------------------------------------------------------------------------------

beside("leaves torch: numpy and back", lambda x: torch.from_numpy(x.detach().numpy() ** 2), wanted="refused")
beside("leaves torch: numpy of a part", lambda x: x * float(x.detach().numpy().mean()), wanted="refused")
beside("leaves torch: item", lambda x: x * x.mean().item(), wanted="refused")
beside("leaves torch: float", lambda x: x * float(x.abs().max()), wanted="refused")
beside("leaves torch: tolist", lambda x: torch.tensor(x.tolist(), dtype=x.dtype) ** 2, wanted="refused")
beside("leaves torch: dlpack", lambda x: torch.from_dlpack(x.detach()) ** 2, wanted="either")
beside("leaves torch: data_ptr", lambda x: _through_memory(x), wanted="refused")
beside("leaves torch: storage", lambda x: _through_storage(x), wanted="either")
beside("leaves torch: pickle", lambda x: _through_pickle(x), wanted="either")
beside("deepcopy of the input", lambda x: _copied(x).sin(), wanted="either")


def _through_memory(x):
    import ctypes

    x = x.detach().contiguous()
    numbers = (ctypes.c_double * x.numel()).from_address(x.data_ptr())
    return torch.tensor(list(numbers), dtype=x.dtype).view(x.shape) ** 2


def _through_storage(x):
    found = torch.empty(0, dtype=x.dtype).set_(x.contiguous().untyped_storage())
    return found[: x.numel()].view(x.shape) ** 2


def _through_pickle(x):
    import io

    memory = io.BytesIO()
    torch.save(x.detach(), memory)
    memory.seek(0)
    return torch.load(memory) ** 2


def _copied(x):
    import copy

    return copy.deepcopy(x.detach())


# ---- Functions that declare a derivative ----------------------------------------------------------------------------


def _function(name, forward, backward, **methods):
    body = {"forward": staticmethod(forward), "backward": staticmethod(backward), **methods}
    return type(name, (torch.autograd.Function,), body)


def _saving(function):
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return function(x)

    return forward


def _matching(ctx, g):
    return 2 * ctx.saved_tensors[0] * g


Square = _function("Square", _saving(torch.square), _matching)
OnceSquare = _function("OnceSquare", _saving(torch.square), torch.autograd.function.once_differentiable(_matching))
NumpySquare = _function("NumpySquare", _saving(lambda x: torch.from_numpy(x.detach().numpy() ** 2)), _matching)
Reversal = _function("Reversal", lambda ctx, x: x * 1.0, lambda ctx, g: -g)
Clipped = _function("Clipped", lambda ctx, x: x * 1.0, lambda ctx, g: g.clamp(-0.01, 0.01))
Scaled = _function("Scaled", _saving(torch.square), lambda ctx, g: 2.02 * ctx.saved_tensors[0] * g)
Blocked = _function("Blocked", lambda ctx, x: x.sin(), lambda ctx, g: None)
NumpyScaled = _function(
    "NumpyScaled",
    _saving(lambda x: torch.from_numpy(x.detach().numpy() ** 2)),
    lambda ctx, g: 2.02 * ctx.saved_tensors[0] * g,
)
NewSquare = _function(
    "NewSquare", lambda x: x * x, _matching, setup_context=staticmethod(_keep), generate_vmap_rule=True
)


def _mark(ctx, x):
    ctx.mark_dirty(x)
    ctx.save_for_backward(x.clone())
    return x.mul_(2)


InPlace = _function("InPlace", _mark, lambda ctx, g: 2 * g)

beside("Function: old style", lambda x: Square.apply(x))
beside("Function: once differentiable", lambda x: OnceSquare.apply(x))
beside("Function: new style with a vmap rule", lambda x: NewSquare.apply(x))
beside("Function: in place", lambda x: InPlace.apply(x.sin()))
beside("Function: numpy inside, derivative declared", lambda x: NumpySquare.apply(x))
beside("Function: gradient reversal", lambda x: Reversal.apply(x) * x)
beside("Function: gradient clipping", lambda x: Clipped.apply(x.sin()))
beside("Function: derivative off by one percent", lambda x: Scaled.apply(x))
beside("Function: no derivative declared", lambda x: Blocked.apply(x))
beside("Function: numpy inside, derivative off by one percent", lambda x: NumpyScaled.apply(x), wanted="refused")


@beside("backward hook that changes the gradient")
def _():
    def hooked(x):
        y = x.sin()
        if y.requires_grad:
            y.register_hook(lambda g: 2 * g)
        return y

    return hooked


# ---- Modes, state and where modules hide ----------------------------------------------------------------------------


class Steerable(nn.Module):
    """Builds its filter from the weights when it is put into evaluation mode, and drops it in training mode."""

    def __init__(self):
        super().__init__()
        self.weight, self.filter = nn.Parameter(torch.randn(4, 4, 3, 3, dtype=torch.float64) / 3), None

    def build(self):
        return self.weight + self.weight.flip(-1)

    def train(self, mode=True):
        self.filter = None if mode else self.build().detach()
        return super().train(mode)

    def forward(self, x):
        return F.conv2d(x, self.build() if self.training else self.filter, padding=1)


class StaleSteerable(Steerable):
    """Has a filter of earlier weights, which evaluation mode brings up to date."""

    def __init__(self):
        super().__init__()
        self.filter = torch.zeros(4, 4, 3, 3, dtype=torch.float64)

    def train(self, mode=True):
        if not mode:
            self.filter = self.build().detach()
        return nn.Module.train(self, mode)

    def forward(self, x):
        return F.conv2d(x, self.filter, padding=1)


beside("filters built by train(False)")(Steerable)
beside("stale filters before eval()")(StaleSteerable)


def _hidden():
    model = Beside(nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5), nn.GELU()))
    model.branch[0].running_mean.uniform_(-0.5, 0.5)
    return model.double()


class _Holder:
    def __init__(self, model):
        self.model = model

    def predict(self, x, scale=1.0):
        return self.model(x) * scale

    __call__ = predict


def _hiding(name, hide):
    @row(f"module hidden in {name}")
    def _():
        model = _hidden()
        return hide(model), model


_hiding("a lambda", lambda model: lambda x: model(x))
_hiding("a partial", lambda model: functools.partial(_Holder(model).predict, scale=2.0))
_hiding("a bound method", lambda model: model.forward)
_hiding("an attribute", _Holder)
_hiding("a list in a closure", lambda model: (lambda models: lambda x: models[0](x))([model]))
_hiding("a default argument", lambda model: lambda x, model=model: model(x))


class Counting(nn.Module):
    """Keeps a counter, a feature and a buffer from call to call, none of which enters its output."""

    def __init__(self):
        super().__init__()
        self.calls, self.feature = 0, None
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.calls = self.calls + 1
        self.feature = x.sin()
        self.mean = 0.9 * self.mean + 0.1 * self.feature.detach().mean((0, 2, 3))
        return self.feature * x


class Writing(nn.Module):
    """Writes features into a buffer and reads them there."""

    def __init__(self):
        super().__init__()
        self.register_buffer("place", torch.zeros(2, 4, 8, 8))

    def forward(self, x):
        self.place[: len(x)].copy_(x.detach().sin())
        return self.place[: len(x)] * x


beside("state rebound in forward")(Counting)
beside("features written into a buffer", wanted="either")(Writing)


# ---- torch's own modules --------------------------------------------------------------------------------------------


@beside("attention: rows masked as a whole")
def _():
    mask = torch.ones(64, 64, dtype=torch.bool).tril(-1)  # the first row sees nothing
    return tokens(lambda t: F.scaled_dot_product_attention(t, t, t, attn_mask=mask))


@beside("attention: causal, grouped heads")
def _():
    def attend(t):
        heads = t.reshape(len(t), -1, 4, 1).transpose(1, 2)
        found = F.scaled_dot_product_attention(heads, heads[:, :2], heads[:, 2:], is_causal=True, enable_gqa=True)
        return found.transpose(1, 2).reshape(t.shape)

    return tokens(attend)


@beside("attention: nn.MultiheadAttention")
def _():
    return Branch(
        lambda self, x: tokens(lambda t: self.attention(t, t, t, need_weights=False)[0])(x),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
    )


@beside("attention: nn.TransformerEncoder with padding")
def _():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    padding = torch.zeros(2, 64, dtype=torch.bool)
    padding[:, 60:] = True

    def run(self, x):
        return tokens(lambda t: F.pad(self.encoder(t, src_key_padding_mask=padding[: len(t)])[:, :60], (0, 0, 0, 4)))(x)

    return Branch(run, encoder=nn.TransformerEncoder(layer, 2))


@beside("attention: nn.Transformer decoder")
def _():
    return Branch(
        lambda self, x: tokens(lambda t: self.decoder(t, t.flip(1)))(x),
        decoder=nn.TransformerDecoderLayer(4, 2, 8, batch_first=True),
    )


def _recurrent(name, make):
    @beside(f"recurrent: {name}")
    def _():
        return Branch(lambda self, x: tokens(lambda t: self.rnn(t[:, :16])[0].repeat(1, 4, 1))(x), rnn=make())


_recurrent("LSTM", lambda: nn.LSTM(4, 4, batch_first=True))
_recurrent("bidirectional GRU", lambda: nn.GRU(4, 2, batch_first=True, bidirectional=True))
_recurrent("RNN", lambda: nn.RNN(4, 4, 2, batch_first=True))


@beside("recurrent: LSTMCell loop")
def _():
    def run(self, x):
        h = c = x.new_zeros(len(x), 4)
        for token in x.flatten(2)[..., :6].unbind(-1):
            h, c = self.cell(token, (h, c))
        return h[..., None, None].expand_as(x)

    return Branch(run, cell=nn.LSTMCell(4, 4))


def _checkpointed(reentrant):
    from torch.utils.checkpoint import checkpoint

    return lambda self, x: checkpoint(self.body, x, use_reentrant=reentrant)


@beside("checkpoint: reentrant")
def _():
    return Branch(_checkpointed(True), body=nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU()))


@beside("checkpoint: not reentrant")
def _():
    return Branch(_checkpointed(False), body=nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU()))


@beside("parametrised: weight_norm")
def _():
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))


@beside("parametrised: spectral_norm")
def _():
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))


@beside("parametrised: orthogonal")
def _():
    return tokens_module(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)))


@beside("parametrised: old weight_norm and spectral_norm")
def _():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = nn.utils.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
    return nn.Sequential(first, nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)))


def tokens_module(module):
    return Branch(lambda self, x: tokens(self.module)(x), module=module)


@beside("weights from the input (dynamic convolution)")
def _():
    def run(self, x):
        kernels = self.make(x.mean((2, 3))).view(-1, 1, 3, 3)
        return F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, padding=1, groups=len(kernels)).view(x.shape)

    return Branch(run, make=nn.Linear(4, 36))


@beside("functional_call in forward")
def _():
    def run(self, x):
        state = {name: value * x.mean() for name, value in self.body.named_parameters()}
        return torch.func.functional_call(self.body, state, (x,))

    return Branch(run, body=nn.Conv2d(4, 4, 3, padding=1))


@beside("normalisation: batch statistics in evaluation")
def _():
    return nn.BatchNorm2d(4, track_running_stats=False)


@beside("normalisation: instance, group, local response, rms")
def _():
    rms = Branch(lambda self, x: self.rms(x), rms=nn.RMSNorm(8))
    return nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4), nn.LocalResponseNorm(3), rms)


@beside("normalisation: batch norm after a transposed view")
def _():
    norm = nn.BatchNorm1d(4)
    norm.running_var.uniform_(0.5, 2)
    return Branch(lambda self, x: self.norm(x.flatten(2)).mT.reshape(len(x), 8, 8, 4).permute(0, 3, 1, 2), norm=norm)


# ---- torch's operations ---------------------------------------------------------------------------------------------


def _square(x):
    return torch.eye(8, dtype=x.dtype) + 0.2 * x


def _spread(value, x):
    return value.reshape(*value.shape, *[1] * (x.ndim - value.ndim)).expand_as(x)


def _hermitian(x):
    return x + x.mT + torch.diag(torch.arange(8, dtype=x.dtype))


def _grid(x):
    line = torch.linspace(-0.9, 0.9, 8, dtype=x.dtype)
    fixed = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    return (fixed + 0.05 * x[:, :2].permute(0, 2, 3, 1)).clamp(-0.95, 0.95)


_INDEX = torch.tensor([3, 0, 3, 1, 2, 5, 7, 7])


def _fresh(x):
    found = torch.zeros_like(x)
    found[:, 1] = x[:, 0] * 2
    found[:, 2, ::2] = x[:, 3, ::2].sin()
    found[x.detach() > 0.5] = 1.0
    return found


def _put(x):
    found = torch.zeros(len(x), 4, 8, 8, dtype=x.dtype)
    found.index_put_((torch.tensor([0]), torch.tensor([1, 1, 2])), x[0, :3], accumulate=True)
    return found


def _strided(x):
    y = x.contiguous() * 1.5
    windows = y.as_strided((len(y), 4, 6, 6, 3), (256, 64, 8, 1, 1))  # overlapping
    return F.pad(windows.sum(-1), (1, 1, 1, 1))


def _in_place_views(x):
    y = x.sin()
    row, column = y[:, :, 2], y[:, :, 3:, 3]
    row.mul_(2)
    column += row[..., :5]
    y[:, 0].copy_(y[:, 1])
    y.view(len(y), -1)[:, 5:9] = 0
    return y


def _overlapping_update(x):
    y = x * 1.0
    y[:, :, 1::2] += y[:, :, ::2]
    return y


def _into(x):
    found = torch.empty_like(x)
    torch.mul(x, x, out=found)
    return found


def _looped(x):
    total = x.new_zeros(())
    for image in x.unbind(0):
        total = total + image.exp().mean()
    return x * total


def _branched(x):
    return torch.sin(x) if bool(x.sum() > -1e9) else x


OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cdist": tokens(lambda t: torch.cdist(t, t.flip(1) + 0.3)[..., :4]),
    "einsum of three": lambda x: torch.einsum("bchw,bdhw,bdij->bcij", x, x, x),
    "index_add": lambda x: torch.zeros_like(x).index_add(3, _INDEX, x),
    "index_add in place": lambda x: torch.zeros_like(x).index_add_(3, _INDEX, x),
    "scatter on fresh zeros": lambda x: torch.zeros_like(x).scatter_(3, _INDEX.expand_as(x).flip(2) % 8, x * 2),
    "scatter_add on fresh zeros": lambda x: torch.zeros_like(x).scatter_add_(2, _INDEX.expand_as(x).mT, x),
    "scatter_reduce": lambda x: torch.zeros_like(x).scatter_reduce(3, _INDEX.expand_as(x), x, "amax"),
    "index_reduce": lambda x: torch.ones_like(x).index_reduce(3, _INDEX, x, "mean"),
    "segment_reduce": lambda x: (
        torch.segment_reduce(
            x.flatten(2).flatten(0, 1).T.contiguous(), "mean", lengths=torch.tensor([10, 20, 34]), axis=0
        )
        .mean(0)
        .view(len(x), 4, 1, 1)
        .expand_as(x)
    ),
    "gather and take_along_dim": lambda x: x.gather(3, _INDEX.expand_as(x)) * x.take_along_dim(x.argsort(2), 2),
    "assignment on fresh zeros": _fresh,
    "index_put that adds": _put,
    "masked_scatter": lambda x: torch.zeros_like(x).masked_scatter(x.detach() > 0, x.flip(3)),
    "masked_fill and where": lambda x: torch.where(x > 0.1, x.masked_fill(x < 0, -1e3).sin(), x * x),
    "nan_to_num": lambda x: torch.nan_to_num(x.clamp(min=0).log(), neginf=0.0),
    "as_strided that overlaps": _strided,
    "in place on views": _in_place_views,
    "in place, reading itself": _overlapping_update,
    "out=": _into,
    "foreach": lambda x: torch._foreach_mul([x, x.sin()], [2.0, 3.0])[1],
    "loop over images": _looped,
    "branch on a value": _branched,
    "grid_sample of the input": lambda x: F.grid_sample(x, _grid(x.detach() * 0), align_corners=False),
    "grid_sample by predicted offsets": lambda x: F.grid_sample(x, _grid(x), padding_mode="border"),
    "grid_sample bicubic": lambda x: F.grid_sample(x, _grid(x), mode="bicubic", align_corners=True),
    "affine_grid": lambda x: F.grid_sample(
        x, F.affine_grid(torch.eye(2, 3, dtype=x.dtype) + 0.1 * x[:, 0, :2, :3], list(x.shape), align_corners=False)
    ),
    "fold and unfold": lambda x: F.fold(F.unfold(x, 3, padding=1).sin(), (8, 8), 3, padding=1),
    "max_unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "max pooling, dilated and padded": lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1, 1, dilation=2),
    "adaptive pooling": lambda x: F.interpolate(F.adaptive_max_pool2d(x, 3) + F.adaptive_avg_pool2d(x, 3), (8, 8)),
    "lp_pool": lambda x: F.interpolate(F.lp_pool2d(x, 2, 2), (8, 8)),
    "interpolate": lambda x: F.interpolate(
        F.interpolate(x, scale_factor=1.7, mode="bicubic", antialias=True), (8, 8), mode="bilinear"
    ),
    "pixel_shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2).sin(), 2),
    "conv_transpose": lambda x: F.conv_transpose2d(x, noise(4, 4, 3, 3, seed=7), padding=1),
    "three-dimensional convolution": lambda x: F.conv3d(x[:, None], noise(1, 1, 3, 3, 3, seed=8), padding=1)[:, 0],
    "reflection, replication, circular padding": lambda x: F.avg_pool2d(
        F.pad(F.pad(F.pad(x, (1, 1, 1, 1), "reflect"), (1, 1, 1, 1), "replicate"), (1, 1, 1, 1), "circular"), 7, 1
    ),
    "sort": lambda x: x.sort(-1, descending=True).values * x,
    "topk": lambda x: _spread(x.flatten(2).topk(3).values.prod(-1), x),
    "median and kthvalue": lambda x: x.median(-1, keepdim=True).values * x.kthvalue(3, 2, keepdim=True).values * x,
    "quantile": lambda x: x * torch.quantile(x.flatten(1), 0.3, dim=1)[:, None, None, None],
    "amax, aminmax, logsumexp": lambda x: x.logsumexp(1, keepdim=True) * x.amax(2, keepdim=True) + x.aminmax().max,
    "cumsum and cumprod": lambda x: x.cumsum(2) + (1 + x).cumprod(3),
    "logcumsumexp and cummax": lambda x: x.logcumsumexp(2) * x.cummax(3).values,
    "var, std, norm": lambda x: x.var((2, 3), keepdim=True) * x.std(1, keepdim=True) + x.norm(dim=2, keepdim=True),
    "linalg: svd": lambda x: torch.linalg.svdvals(_square(x))[..., None] * x,
    "linalg: svd, low rank": lambda x: (lambda u, s, v: (u[..., :2] * s[..., None, :2]) @ v[..., :2, :])(
        *torch.linalg.svd(_square(x) @ torch.diag(torch.arange(1.0, 9.0, dtype=x.dtype)))
    ),
    "linalg: qr": lambda x: torch.linalg.qr(_square(x)).R,
    "linalg: inverse": lambda x: torch.linalg.inv(_square(x)),
    "linalg: det and slogdet": lambda x: (
        x * (torch.det(_square(x)) + torch.linalg.slogdet(_square(x))[1])[..., None, None]
    ),
    "linalg: solve": lambda x: torch.linalg.solve(_square(x), x),
    "linalg: eigh": lambda x: torch.linalg.eigvalsh(_hermitian(x))[..., None] * x,
    "linalg: cholesky": lambda x: torch.linalg.cholesky(x @ x.mT + 2 * torch.eye(8, dtype=x.dtype)),
    "linalg: matrix_exp": lambda x: torch.linalg.matrix_exp(0.3 * x),
    "linalg: pinv and lstsq": lambda x: torch.linalg.pinv(_square(x)),
    "bilinear": lambda x: F.bilinear(
        x.permute(0, 2, 3, 1).contiguous(), x.permute(0, 3, 2, 1).contiguous(), noise(4, 4, 4, seed=9)
    ).permute(0, 3, 1, 2),
    "embedding_bag with weights": lambda x: _spread(
        F.embedding_bag(
            torch.arange(4).expand(len(x), 4), noise(4, 4, seed=2), per_sample_weights=x.mean((2, 3)), mode="sum"
        ),
        x,
    ),
    "activations with parameters": lambda x: F.prelu(x, noise(4, seed=4)) + F.glu(torch.cat([x, x.flip(1)], 1), 1),
    "hard activations": lambda x: F.hardswish(3 * x) + F.hardsigmoid(x) + F.relu6(x) + F.hardtanh(x, -0.3, 0.2),
    "rare activations": lambda x: F.softsign(x) + F.tanhshrink(x) + F.logsigmoid(x) + F.softshrink(x) + F.mish(x),
    "special functions": lambda x: (
        torch.special.i0(x) + torch.special.erfcx(x) + torch.lgamma(2 + x) + torch.digamma(3 + x)
    ),
    "atan2, hypot, logaddexp": lambda x: (
        torch.atan2(x, x.flip(1)) + torch.hypot(x, x.flip(2)) + torch.logaddexp(x, x.flip(3))
    ),
    "remainder and fmod": lambda x: torch.remainder(5 * x, 1.3) + torch.fmod(5 * x, 0.7),
    "lerp, addcmul, addcdiv": lambda x: (
        torch.lerp(x, x.sin(), x.cos()) + torch.addcmul(x, x, x) + torch.addcdiv(x, x, 3 + x)
    ),
    "cosine_similarity and normalize": lambda x: (
        F.normalize(x, dim=1) * F.cosine_similarity(x, x.flip(1), dim=1)[:, None]
    ),
    "kl_div and cross_entropy": lambda x: (
        x * F.kl_div(x.log_softmax(1), x.flip(2).softmax(1)) + F.cross_entropy(x, x.argmax(1))
    ),
    "tril, rot90, roll, repeat_interleave": lambda x: (
        x.tril() + x.rot90(1, (2, 3)).roll((1, 2), (2, 3)) + x[..., :4].repeat_interleave(2, 3)
    ),
    "tensordot, outer, kron": lambda x: torch.kron(x[:, :2, :4, :4], noise(2, 2, 2, seed=1)),
    "unfold by tensor method": lambda x: F.pad(x.unfold(2, 3, 1).prod(-1), (0, 0, 1, 1)),
    "chunk, split, stack, unbind": lambda x: torch.cat(
        [a * b for a, b in zip(x.chunk(2, 1), x.split([2, 2], 1)[::-1], strict=True)], 1
    ),
    "tensor_split, hsplit, block_diag": lambda x: (
        torch.stack(x.tensor_split(3, -1)[0].unbind(-1), -1).sum(-1, keepdim=True) * x
    ),
    "memory formats": lambda x: (x.to(memory_format=torch.channels_last) * 2).contiguous().square(),
    "expand and in place after": lambda x: x.mean((2, 3), keepdim=True).expand_as(x).clone().add_(x).sin_(),
    "corrcoef and cov": lambda x: (
        x * torch.stack([torch.cov(image.flatten(1)) for image in x]).mean((1, 2))[:, None, None, None]
    ),
    "trapezoid, diff, gradient": lambda x: (
        torch.gradient(x, dim=2)[0] * torch.trapezoid(x, dim=3)[..., None] + F.pad(x.diff(dim=3), (0, 1))
    ),
    "bucketize and one_hot": lambda x: (
        F.one_hot(torch.bucketize(x.detach(), torch.linspace(-1, 1, 3, dtype=x.dtype)), 4).to(x)[..., 0] * x
    ),
    "ctc_loss": lambda x: (
        x
        * F.ctc_loss(
            x.flatten(2).permute(2, 0, 1).log_softmax(2),
            torch.tensor([[1, 2], [3, 1]])[: len(x)],
            [64] * len(x),
            [2] * len(x),
            reduction="none",
        ).view(-1, 1, 1, 1)
    ),
}

# Autograd's own derivative is NaN where a logarithm of zero is replaced; `out=` has none while gradients are on.
_EITHER = {"nan_to_num", "out="}

for _name, _operation in OPERATIONS.items():
    beside(f"torch: {_name}", _operation, wanted="either" if _name in _EITHER else "right")


# ---- Libraries ------------------------------------------------------------------------------------------------------

_VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8}
_VIT |= {"patch_size": 4, "num_labels": 3}
_STAGES = {"depths": [1, 1], "num_labels": 3}

TRANSFORMERS: dict[str, tuple[dict[str, Any], str]] = {
    "ViT": (_VIT, "ForImageClassification"),
    "DeiT": (_VIT, "ForImageClassification"),
    "Beit": (_VIT | {"use_relative_position_bias": True}, "ForImageClassification"),
    "Data2VecVision": (_VIT | {"use_shared_relative_position_bias": True}, "ForImageClassification"),
    "Dinov2": (_VIT | {"mlp_ratio": 2}, "ForImageClassification"),
    "Dinov2WithRegisters": (_VIT | {"num_register_tokens": 2}, "ForImageClassification"),
    "IJepa": (_VIT, "ForImageClassification"),
    "ViTMSN": (_VIT, "ForImageClassification"),
    "ViTMAE": (_VIT, "Model"),
    "Hiera": (
        {
            "embed_dim": 8,
            "image_size": [16, 16],
            "patch_size": [3, 3],
            "patch_stride": [2, 2],
            "patch_padding": [1, 1],
            "depths": [1, 1],
            "num_heads": [1, 2],
            "masked_unit_size": [4, 4],
            "query_stride": [2, 2],
            "num_query_pool": 1,
            "num_labels": 3,
        },
        "ForImageClassification",
    ),
    "CLIPVision": (_VIT, "Model"),
    "SiglipVision": (_VIT, "Model"),
    "ChineseCLIPVision": (_VIT, "Model"),
    "Swin": (
        _STAGES | {"image_size": 16, "patch_size": 2, "embed_dim": 8, "num_heads": [2, 2], "window_size": 4},
        "ForImageClassification",
    ),
    "Swinv2": (
        _STAGES | {"image_size": 16, "patch_size": 2, "embed_dim": 8, "num_heads": [2, 2], "window_size": 4},
        "ForImageClassification",
    ),
    "ConvNext": (_STAGES | {"hidden_sizes": [8, 8], "num_stages": 2}, "ForImageClassification"),
    "ConvNextV2": (_STAGES | {"hidden_sizes": [8, 8], "num_stages": 2}, "ForImageClassification"),
    "ResNet": (_STAGES | {"embedding_size": 8, "hidden_sizes": [8, 16]}, "ForImageClassification"),
    "RegNet": (_STAGES | {"embedding_size": 8, "hidden_sizes": [8, 16], "groups_width": 4}, "ForImageClassification"),
    "PoolFormer": (
        {
            "num_labels": 3,
            "depths": [1, 1],
            "hidden_sizes": [8, 8],
            "num_encoder_blocks": 2,
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "padding": [1, 1],
        },
        "ForImageClassification",
    ),
    "FocalNet": (
        _STAGES
        | {"image_size": 16, "embed_dim": 8, "focal_levels": [2, 2], "focal_windows": [3, 3], "hidden_sizes": [8, 8]},
        "ForImageClassification",
    ),
    "Segformer": (
        {
            "num_labels": 3,
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 8],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 8,
        },
        "ForSemanticSegmentation",
    ),
    "MobileViT": (
        {
            "num_labels": 3,
            "image_size": 32,
            "hidden_sizes": [8, 8, 8],
            "neck_hidden_sizes": [4, 4, 4, 8, 8, 8, 8],
            "num_attention_heads": 2,
        },
        "ForImageClassification",
    ),
    "MobileNetV2": (
        {"num_labels": 3, "depth_multiplier": 0.1, "min_depth": 4, "depth_divisible_by": 4},
        "ForImageClassification",
    ),
    "Pvt": (
        {
            "num_labels": 3,
            "image_size": 16,
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sequence_reduction_ratios": [2, 1],
            "hidden_sizes": [8, 8],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        "ForImageClassification",
    ),
    "Levit": (
        {
            "num_labels": 3,
            "image_size": 32,
            "hidden_sizes": [8, 8, 8],
            "num_attention_heads": [1, 1, 1],
            "depths": [1, 1, 1],
            "key_dim": [4, 4, 4],
        },
        "ForImageClassification",
    ),
    "VitDet": (
        _VIT
        | {
            "window_size": 2,
            "residual_block_indices": [0],
            "window_block_indices": [1],
            "use_relative_position_embeddings": True,
        },
        "Model",
    ),
    "DPT": (
        _VIT
        | {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [4, 4, 4, 4],
            "fusion_hidden_size": 4,
            "reassemble_factors": [4, 2, 1, 0.5],
            "image_size": 16,
        },
        "ForDepthEstimation",
    ),
    "Perceiver": (
        {
            "num_latents": 4,
            "d_latents": 8,
            "d_model": 5,
            "num_blocks": 1,
            "num_self_attends_per_block": 1,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 1,
            "image_size": 8,
            "num_labels": 3,
        },
        "ForImageClassificationLearned",
    ),
}


def _returned(found):
    for key in ("logits", "predicted_depth", "pooler_output", "last_hidden_state", "feature_maps"):
        value = getattr(found, key, None)
        if value is not None:
            return value[0] if isinstance(value, tuple) else value
    raise AssertionError(list(found))


def _transformer(name, options, kind):
    size = options.get("image_size", 16)
    size = size if isinstance(size, int) else size[0]

    @row(f"transformers: {name}", shape=(2, 3, size, size), output=_returned, needs="transformers")
    def _():
        import transformers

        config = getattr(transformers, f"{name}Config")(**options)
        model = getattr(transformers, f"{name}{kind}")(config)
        _lively(model, size)
        return model


def _lively(model, size):
    """Weights of size one and statistics of noise: initial weights of 0.02 leave nothing to measure."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=(parameter[0].numel()) ** -0.5)
        elif not bool(parameter.any()) or parameter.ndim == 0:
            nn.init.normal_(parameter, std=0.1)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(torch.randn(8, 3, size, size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


for _name, (_options, _kind) in TRANSFORMERS.items():
    _transformer(_name, _options, _kind)


def _kornia(name, function):
    @beside(f"kornia: {name}", needs="kornia")
    def _():
        import kornia

        return lambda x: function(kornia, x)


_kornia("gaussian_blur2d", lambda k, x: k.filters.gaussian_blur2d(x, (3, 3), (1.0, 1.5)))
_kornia(
    "gaussian_blur2d, sigma from the input",
    lambda k, x: k.filters.gaussian_blur2d(x, (3, 3), x.std((1, 2, 3))[:, None].expand(-1, 2) + 0.5),
)
_kornia("spatial_gradient", lambda k, x: k.filters.spatial_gradient(x).square().sum(2))
_kornia("sobel and laplacian", lambda k, x: k.filters.sobel(x) + k.filters.laplacian(x, 3))
_kornia("median_blur", lambda k, x: k.filters.median_blur(x, 3))
_kornia("bilateral_blur", lambda k, x: k.filters.bilateral_blur(x, (3, 3), 0.3, (1.0, 1.0)))
_kornia(
    "unsharp_mask, motion_blur",
    lambda k, x: k.filters.unsharp_mask(x, (3, 3), (1.0, 1.0)) + k.filters.motion_blur(x, 3, 30.0, 0.5),
)
_kornia("guided_blur", lambda k, x: k.filters.guided_blur(x[:, :1], x, 3, 0.1))
_kornia(
    "warp_affine",
    lambda k, x: k.geometry.transform.warp_affine(
        x, torch.tensor([[0.9, 0.2, 0.3], [-0.2, 0.9, 0.6]], dtype=x.dtype).expand(len(x), 2, 3), (8, 8)
    ),
)
_kornia(
    "warp_perspective by the input",
    lambda k, x: k.geometry.transform.warp_perspective(x, torch.eye(3, dtype=x.dtype) + 0.01 * x[:, 0, :3, :3], (8, 8)),
)
_kornia(
    "rotate, scale, resize",
    lambda k, x: k.geometry.transform.resize(
        k.geometry.transform.rotate(x, torch.tensor([17.0], dtype=x.dtype).expand(len(x))), (8, 8)
    ),
)
_kornia("rgb_to_hsv", lambda k, x: x * k.color.rgb_to_hsv(x[:, :3].sigmoid()).sum(1, keepdim=True))
_kornia(
    "rgb_to_lab, rgb_to_yuv",
    lambda k, x: (
        x * (k.color.rgb_to_lab(x[:, :3].sigmoid()) + k.color.rgb_to_yuv(x[:, 1:].sigmoid())).mean(1, keepdim=True)
    ),
)
_kornia("morphology", lambda k, x: k.morphology.dilation(x, torch.ones(3, 3, dtype=x.dtype)))
_kornia("harris response", lambda k, x: k.feature.harris_response(x))
_kornia(
    "adjust gamma and contrast",
    lambda k, x: k.enhance.adjust_gamma(x.sigmoid(), 1.7) + k.enhance.adjust_contrast(x, 0.5),
)
_kornia("spatial soft argmax", lambda k, x: x * k.geometry.subpix.spatial_soft_argmax2d(x).sum(-1)[..., None, None])
_kornia("ssim", lambda k, x: k.metrics.ssim(x, x.flip(1), 3))
_kornia("distance transform", lambda k, x: k.contrib.distance_transform(x.sigmoid(), 3) * x)


def _timm(name, size=32, options=dict):
    @row(f"timm: {name}", shape=(1, 3, size, size), needs="timm")
    def _():
        import timm

        model = timm.create_model(name, num_classes=3, **options())
        _lively(model, size)
        return model


_timm("csatv2", 64, lambda: {"dims": (32, 8, 8, 8), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)})
_timm("test_vit", options=lambda: {"img_size": 32, "patch_size": 8})
_timm("test_resnet")
_timm("test_efficientnet")
_timm("test_convnext")
_timm("test_nfnet")
_timm("test_mambaout")
_timm("test_byobnet")
_timm("resnet10t", options=lambda: {"aa_layer": _blur_pool(), "channels": (4, 4, 8, 8), "stem_width": 4})
_timm("naflexvit_base_patch16_gap", options=lambda: {"embed_dim": 8, "depth": 2, "num_heads": 2})


def _blur_pool():
    from timm.layers import BlurPool2d

    return BlurPool2d


@row("e3nn: spherical harmonics and a tensor product of gradients", needs="e3nn")
def _():
    from e3nn import o3

    def run(self, x):
        y = x.permute(0, 2, 3, 1)  # colours as vectors
        harmonics = o3.spherical_harmonics("0e + 1o + 2e", y, normalize=True)
        return self.linear(self.product(harmonics, y)).mean((1, 2)) + y.mean((1, 2)).sum(-1, keepdim=True)

    return Branch(
        run,
        product=o3.FullyConnectedTensorProduct("0e + 1o + 2e", "1o", "2x0e + 2x1o"),
        linear=o3.Linear("2x0e + 2x1o", "3x0e"),
    )


@row("e3nn: gate and norm activation", needs="e3nn")
def _():
    from e3nn import o3
    from e3nn.nn import Gate, NormActivation

    return Branch(
        lambda self, x: (lambda y: self.norm(self.gate(self.linear(torch.cat([y, y.sin()], -1)))))(
            x.permute(0, 2, 3, 1)
        ),
        linear=o3.Linear("3x0e + 1x1o", "4x0e + 2x1o"),
        gate=Gate("2x0e", [torch.tanh], "2x0e", [torch.sigmoid], "2x1o"),
        norm=NormActivation("2x0e + 2x1o", torch.sigmoid),
    )


def _graph(name, make):
    @beside(f"torch_geometric: {name}", needs="torch_geometric")
    def _():
        place = torch.arange(64).view(8, 8)
        right = torch.stack([place[:, :-1].flatten(), place[:, 1:].flatten()])
        down = torch.stack([place[:-1].flatten(), place[1:].flatten()])
        edges = torch.cat([right, down, right.flip(0), down.flip(0)], 1)

        def run(self, x):
            images = [self.layer(image, edges) for image in x.flatten(2).mT.unbind(0)]
            return torch.stack(images).mT.reshape(x.shape)

        import torch_geometric.nn

        return Branch(run, layer=make(torch_geometric.nn))


_graph("GCNConv", lambda library: library.GCNConv(4, 4))
_graph("GATConv", lambda library: library.GATConv(4, 2, heads=2))
_graph("SAGEConv with max", lambda library: library.SAGEConv(4, 4, aggr="max"))
_graph("PNA-like several aggregations", lambda library: library.SAGEConv(4, 4, aggr=["mean", "std", "softmax"]))
