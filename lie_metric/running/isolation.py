"""Running a model for a measurement so that nothing of it, or of the training around it, is changed."""

from __future__ import annotations

import functools
import importlib
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lie_metric.running.draws import MEASURED
from lie_metric.running.modules import Found, found_modules, refuse_lazy
from lie_metric.running.sharding import refuse_sharded
from lie_metric.running.state import State
from lie_metric.warning import warn

__all__ = ["evaluation", "isolated"]


# Modules, and much of what else is set below, belong to the whole process.
_LOCK = threading.RLock()


@contextmanager
def evaluation(model: object) -> Iterator[None]:
    """Puts a model into evaluation mode; afterwards everything that its modules hold is what it was.

    ``eval()`` itself is called, because networks may do more in it than set flags: build filters from weights, fuse
    layers. Modules that the model hides from its own ``eval()``, in a plain list, stay as they are for the same reason.
    Afterwards every module has its own mode, and attributes (containers among them entry by entry), buffers,
    parameters, their gradients, hooks and submodules are those of before, in value as well, and so are random states.
    Attributes that a model sets anew in passing, such as counters and cached features, are given back without a word.
    Only what lies on modules, or on the callable itself, is: lists that a closure or a hook fills stay filled.

    Args:
        model: A module, or any other callable: the modules that it holds in closures, partials, as the owner of a bound
            method or in attributes are treated alike.

    Yields:
        Nothing.

    Raises:
        RuntimeError: If a layer's weights are not made yet, or are dealt out over processes.

    Warns:
        UserWarning: If the model changed a buffer although it was in evaluation mode; the buffer is restored. If a
            batch norm ran that is not in evaluation mode, or something was written to that no one saw in time.
    """
    with _evaluation(model, _Watch):
        yield


@contextmanager
def _evaluation(model: object, mode: type[_Watch]) -> Iterator[None]:
    with _LOCK:
        found = found_modules(model)
        refuse_lazy(found.modules.values())
        refuse_sharded(found.modules.values())
        state = State(found)
        watch = mode(state, found)
        try:
            state.leave_inference()
            for root in found.roots:
                _to_evaluation(root)
            state.evaluated()
            MEASURED.append(state)
            try:
                with watch:
                    yield
            finally:
                MEASURED.pop()
        finally:
            _restore(state, watch)


def _to_evaluation(root: nn.Module) -> None:
    """Calls ``.eval()``, which exported programs refuse: they run in the mode that they were exported in."""
    try:
        root.eval()
    except NotImplementedError:
        if not isinstance(root, torch.fx.GraphModule):
            raise


def _restore(state: State, watch: _Watch) -> None:
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            changed, lost = state.restore()
            watch.restore()
            break
        except KeyboardInterrupt as error:  # afterwards: half a model is of no use to anyone
            interrupted = error
    if interrupted is not None:
        raise interrupted
    changed = [path for path in changed if path.rpartition(".")[0] not in watch.norms]
    if changed:
        warn(
            f"The model changed its buffers {changed[:4]} in evaluation mode; they were given their values back. "
            "The function that was measured may differ from call to call."
        )
    if watch.norms:
        warn(
            f"Batch norm ran in training mode in {sorted(watch.norms)[:4]}: what was measured depends on "
            "the other images of a batch. Its running statistics were given back. Call `eval()` on it, or pass as the "
            "model the module itself or a function that holds it."
        )
    if lost:
        warn(
            f"The model wrote to {lost[:4]} in evaluation mode, in a way that was not seen in time: their values could "
            "not be given back. Register them as buffers, or write with torch's own operations."
        )


class _Watch(TorchFunctionMode):
    """Sees what is written to while a model runs.

    Attributes:
        norms: Batch norms that ran in training mode.
    """

    def __init__(self, state: State, found: Found) -> None:
        super().__init__()
        self.norms: set[str] = set()
        self._state, self._found = state, found
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.endswith("_") and (not name.endswith("__") or name in _WRITING) and name != "requires_grad_":
            self._write(args[0] if args else kwargs.get("input"))
        elif kwargs and isinstance(kwargs.get("out"), Tensor):
            self._write(kwargs["out"])
        elif func is nn.functional.batch_norm or func is nn.functional.instance_norm:
            self._norm(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _write(self, target: Any) -> None:
        if not isinstance(target, Tensor) or is_functorch_wrapped_tensor(target):
            return
        self._state.before_write(target)
        # The count of batches of a module that could not be found is raised before its statistics are.
        if target.ndim == 0 and not target.is_floating_point():
            self._copy(target)

    def _norm(
        self,
        func: Any,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool | None = None,
        *rest: Any,
        use_input_stats: bool = True,
        **options: Any,
    ) -> None:
        """Both functions take their arguments in the same order."""
        learning = training if training is not None else func is nn.functional.instance_norm and use_input_stats
        if not learning or running_mean is None or running_var is None:
            return
        self._copy(running_mean)
        self._copy(running_var)
        paths = [
            path
            for path, module in self._found.modules.values()
            if getattr(module, "running_mean", None) is running_mean
        ]
        self.norms.add(paths[0] if paths else f"a module of {len(running_mean)} channels that is out of sight")

    def _copy(self, tensor: Tensor) -> None:
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor, tensor.detach().clone()

    def restore(self) -> None:
        """Gives tensors of modules that could not be found their values back."""
        with torch.no_grad():
            for tensor, value in self._copies.values():
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


_WRITING = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip


class _Differentiable(_Watch):
    """Functions whose derivatives are missing, slow or wrong, computed in another way.

    Batch normalisation by running statistics is one multiplication and one addition: decomposed for tangents it takes
    many passes, a third of the time of a residual network, and on the CPU its own gradient is wrong by 140 % for one
    image when the cotangent is a transposed view (seen in torch 2.15.0). Pooling to one pixel is a mean, whose result
    torch lays out anew where channels come last: that has no batching rule, and torch warns of it. Recurrent layers
    have no forward rule in oneDNN. Neither have pairwise distances, of which second derivatives are NaN at 0.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.batch_norm:
            folded = _fold(*args, **kwargs)
            if folded is not None:
                return folded
        if func is torch.cdist:
            found = _distances(*args, **kwargs)
            if found is not None:
                return found
        if func is nn.functional.adaptive_avg_pool2d and _to_one(*args, **kwargs):
            return (args[0] if args else kwargs["input"]).mean((-2, -1), keepdim=True)
        if getattr(func, "__name__", "") in _RECURRENT:
            enabled = torch._C._get_mkldnn_enabled()
            # `torch.backends.mkldnn.flags` sets TF32 too, and warns of it on every processor.
            torch._C._set_mkldnn_enabled(False)
            try:
                return func(*args, **kwargs)
            finally:
                torch._C._set_mkldnn_enabled(enabled)
        return super().__torch_function__(func, types, args, kwargs)


def _to_one(input: Tensor, output_size: Any) -> bool:
    return output_size == 1 or (isinstance(output_size, (tuple, list)) and tuple(output_size) == (1, 1))


# Entries of differences, which `cdist` does without: beyond it, as for features and codebooks, its own derivatives do.
_MANY = 2**24


def _distances(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor | None:
    """Norms of differences, at rest to any order where points are at one place."""
    if x1.numel() * x2.shape[-2] > _MANY:
        return None
    apart = x1[..., :, None, :] - x2[..., None, :, :]
    alike = (apart == 0).all(-1)
    return torch.linalg.vector_norm(apart.masked_fill(alike[..., None], 1), p, -1).masked_fill(alike, 0)


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


@functools.cache
def _import_decompositions() -> None:
    """Imports what torch imports with the first forward-mode derivative, because that scripts functions and warns.

    Once and before anything runs: the filters of warnings belong to all threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("torch._decomp.decompositions_for_jvp")
        except ImportError:
            return  # a torch that has none of it has nothing to warn of


@contextmanager
def isolated(model: object) -> Iterator[None]:
    """The conditions under which derivatives of any model are right and leave no trace.

    Evaluation mode (:func:`evaluation`); no inference mode; no autocast; compiled code set aside, because one
    derivative through a compiled module makes its later training calls run uncompiled; attention by the backend that
    has every derivative; batch normalisation as one multiply-add; random states given back. Gradient mode is kept.

    Some of these hold for the whole process, as do random states: threads that measure at once wait for one another,
    and a thread may enter again what it has entered. What another thread draws meanwhile from the global random states
    is drawn again by whoever comes later, because the states are given back as they were. Other processes, such as
    workers of a loader, are not concerned, and nothing here waits for one.

    Args:
        model: The model that is about to be measured.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(_LOCK)
        _import_decompositions()
        fast_path = torch.backends.mha.get_fastpath_enabled()
        grad = torch.is_grad_enabled()
        stack.enter_context(torch.inference_mode(False))
        # Leaving inference mode turns gradients on.
        stack.enter_context(torch.set_grad_enabled(grad))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        # Inside, because what a network makes of its weights in `eval` is a part of the function.
        stack.enter_context(_evaluation(model, _Differentiable))
        yield
