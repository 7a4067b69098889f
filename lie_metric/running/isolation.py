"""Running a model for a measurement so that nothing of it, or of the training around it, is changed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["evaluation", "isolated", "random_state"]


class _Differentiable(TorchFunctionMode):
    """Functions whose derivatives are missing, slow or wrong, computed in another way.

    Batch normalisation by running statistics is one multiplication and one addition: decomposed for tangents it takes
    many passes, a third of the time of a residual network, and on the CPU its own gradient is wrong by 140 % for one
    image when the cotangent is a transposed view (seen in torch 2.15.0). Recurrent layers have no forward rule
    in oneDNN.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.batch_norm:
            folded = _fold(*args, **kwargs)
            if folded is not None:
                return folded
        if getattr(func, "__name__", "") in _RECURRENT:
            with torch.backends.mkldnn.flags(enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def _fold(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or running_var is None or input.dtype != running_var.dtype:
        return None
    factor = (running_var + eps).rsqrt()
    if weight is not None:
        factor = factor * weight
    shift = -running_mean * factor
    if bias is not None:
        shift = shift + bias
    shape = (1, -1, *[1] * (input.ndim - 2))
    return input * factor.view(shape) + shift.view(shape)


@contextmanager
def random_state() -> Iterator[None]:
    """Gives the global random states (Python, NumPy, torch on CPU and CUDA) back as they were, whatever happens."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def evaluation(model: object) -> Iterator[None]:
    """Puts a module into evaluation mode; afterwards modes and buffers are what they were.

    Args:
        model: A module, or any other callable, which is left alone.

    Yields:
        Nothing.

    Warns:
        UserWarning: If the model changed a buffer although it was in evaluation mode; the buffer is restored.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (name, buffer, buffer._version, buffer.clone())
        for name, buffer in model.named_buffers()
        if not buffer.is_inference()  # these keep no version, and are caches that nothing is trained with
    ]
    try:
        # `eval` of a user's class may do more than set flags; flags are all that is needed here.
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        changed = [name for name, buffer, version, _ in buffers if buffer._version != version]
        for name, buffer, _, value in buffers:
            if name in changed:
                with torch.no_grad():
                    buffer.copy_(value)
        if changed:
            warnings.warn(
                f"The model changed its buffers {changed[:4]} in evaluation mode; they were given their values back. "
                "The function that was measured may differ from call to call.",
                stacklevel=3,
            )


@contextmanager
def isolated(model: object) -> Iterator[None]:
    """The conditions under which derivatives of any model are right and leave no trace.

    Evaluation mode (:func:`evaluation`); no inference mode; no autocast; compiled code set aside, because one
    derivative through a compiled module makes its later training calls run uncompiled; attention by the backend that
    has every derivative; batch normalisation as one multiply-add; random states given back. Gradient mode is kept.

    Args:
        model: The model that is about to be measured.

    Yields:
        Nothing.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    grad = torch.is_grad_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        # Leaving inference mode turns gradients on.
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(random_state())
        stack.enter_context(evaluation(model))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(_Differentiable())
        yield
