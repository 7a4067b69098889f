"""How hidden tensors are assumed to move: by their layout, by borders around maps, and which calls move with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lie_metric.attribution.graph import Variable
from lie_metric.representations import (
    ChannelsLast,
    Field,
    Image,
    Invariant,
    Padded,
    Representation,
    Tokens,
    declared_grid,
    grid_size,
)

__all__ = ["Actions", "Border", "border", "commutes", "padding_of"]


Border = Callable[[Tensor, Representation], Representation]
"""From an output and the action that its layout suggests to the one that it is assumed to carry."""


class Actions:
    """The actions that tensors inside a model are taken to carry: what was given for a module, or what layout suggests.

    Args:
        inputs: The images, shape (B, C, H, W).
        representation: The action they carry.
        modules: Modules of the model, of which some say on what grid their tokens stand.
        overrides: Actions for tensors made inside the modules with these paths, where they fit; the innermost counts.
    """

    def __init__(
        self,
        inputs: Tensor,
        representation: Representation,
        modules: Iterable[nn.Module],
        overrides: Mapping[str, Representation],
    ) -> None:
        # Of points nothing tells a table of pairs (B, N, N, C) from an image: what moves has to be declared.
        self.on_grid = callable(getattr(representation, "map", None)) or not hasattr(representation, "dimension")
        self.shape = inputs.shape
        self.size = tuple(inputs.shape[-2:])
        self.layout = representation
        self.images = len(inputs)
        self.overrides = sorted(overrides.items(), key=lambda item: len(item[0]), reverse=True)
        self.grids = [grid for grid in map(declared_grid, modules) if grid is not None]

    def given(self, tensor: Tensor, path: str) -> Representation | None:
        """The action that was given for the module in which a tensor is made.

        Args:
            tensor: The tensor.
            path: The module's path.

        Returns:
            The action; None if there is none that fits.
        """
        for name, representation in self.overrides:
            if path == name or path.startswith(f"{name}.") or not name:
                try:
                    representation.check(tensor, "tensor")
                except ValueError:
                    continue
                return representation
        return None

    def suggested(self, tensor: Tensor) -> Representation:
        """The action that the layout suggests; nothing else in the sum depends on whether it is the right one.

        Args:
            tensor: The tensor.

        Returns:
            The action.
        """
        shape = tuple(tensor.shape)
        if tensor.is_complex() or not self.on_grid:
            return Invariant()
        dimension = getattr(self.layout, "dimension", None) or 2
        if dimension != 2:
            return self._assume_field(tensor, dimension)
        if tensor.ndim == 4:
            first, last = self._is_map(shape[2:]), self._is_map(shape[1:3])
            if first and not (last and shape[3] > shape[1] == shape[2]):
                return Image()
            if last:
                return ChannelsLast()
        if tensor.ndim == 3 and shape[0] == self.images:
            return self._tokens(shape[1]) or Invariant()
        return Invariant()

    def _assume_field(self, tensor: Tensor, dimension: int) -> Representation:
        """Signals and volumes of the inputs' proportions, with channels first; anything else is taken as invariant."""
        size, whole = tensor.shape[2:], self.shape[2:]
        if len(size) != dimension or dimension not in {1, 3} or len(whole) != dimension or min(size) < 2:
            return Invariant()
        ratios = [own / full for own, full in zip(size, whole, strict=True)]
        # To within a sample of rounding, along the axis where it counts most.
        alike = max(ratios) - min(ratios) < 1 / min(whole) and max(ratios) <= 2
        return Field(dimension, getattr(self.layout, "spacing", ())) if alike else Invariant()

    def _is_map(self, size: Sequence[int]) -> bool:
        (h, w), (height, width) = size, self.size
        return min(h, w) > 1 and abs(h * width - w * height) < max(height, width) and h <= 2 * height

    def _tokens(self, count: int) -> Tokens | None:
        for grid in self.grids:
            if grid.prefix + grid.grid_size[0] * grid.grid_size[1] == count:
                return grid
        height, width = self.size
        for prefix in (0, 1, 2):
            rows = round(math.sqrt((count - prefix) * height / width)) if count > prefix else 0
            if rows > 1 and (count - prefix) % rows == 0 and self._is_map((rows, (count - prefix) // rows)):
                return Tokens((rows, (count - prefix) // rows), prefix)
        return None


_ARGUMENTS = {
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "max_pool2d": ("input", "kernel_size", "stride", "padding", "dilation"),
    "avg_pool2d": ("input", "kernel_size"),
}


def padding_of(args: tuple, kwargs: dict) -> tuple[list[int], tuple] | None:
    """What a convolution pads its maps by, as `F.pad` takes it, and its arguments without; None if it does not.

    Args:
        args: Arguments of the convolution.
        kwargs: Its keyword arguments.

    Returns:
        Widths of the padding, and all arguments by position without it.
    """
    names = _ARGUMENTS["conv2d"]
    call: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    call |= dict(zip(names, args, strict=False)) | kwargs
    image, weight, _, _, padding, dilation, _ = without = [call[name] for name in names]
    if padding == "valid" or not image.requires_grad or image.ndim != 4:
        return None
    if padding == "same":
        added = [(size - 1) * step for size, step in zip(weight.shape[2:], _pair(dilation), strict=True)]
        rows, columns = ((extent // 2, extent - extent // 2) for extent in added)
    else:
        rows, columns = ((extent, extent) for extent in _pair(padding))
    without[4] = 0
    return ([*columns, *rows], tuple(without)) if any((*columns, *rows)) else None


def _pair(value: Any) -> tuple[int, int]:
    """What torch takes for height and width: one number for both, or one for each."""
    return (value[0], value[-1]) if isinstance(value, (tuple, list)) else (value, value)


def border(name: str, args: tuple, kwargs: dict, given: Sequence[Variable]) -> Border | None:
    """What becomes of borders around maps: a padding adds to them, and windows that reach over them take them away.

    Padded maps would otherwise be taken for maps of the whole image, and their padding for a change of scale.

    Args:
        name: Name of the torch function.
        args: Its arguments.
        kwargs: Its keyword arguments.
        given: The tensors among them that depend on the input.

    Returns:
        What makes of a suggested action the one that an output carries; None where there are no borders.
    """
    first = given[0].representation
    if name == "pad" and isinstance(first, (Image, ChannelsLast, Padded)):
        layout, sides = (first.carrier, first.sides) if isinstance(first, Padded) else (first, (0, 0, 0, 0))
        pads = [*(args[1] if len(args) > 1 else kwargs["pad"]), 0, 0, 0, 0, 0, 0]
        pads = pads[2:6] if isinstance(layout, ChannelsLast) else pads[:4]
        widened = _within(layout, [side + pad for side, pad in zip(sides, pads, strict=True)])
        return lambda value, assumed: widened
    borders = {
        grid_size(variable.representation.carrier, variable.value): variable.representation
        for variable in given
        if isinstance(variable.representation, Padded)
    }
    if not borders:
        return None

    def follow(value: Tensor, assumed: Representation) -> Representation:
        if not isinstance(assumed, (Image, ChannelsLast)):
            return assumed
        same = borders.get(grid_size(assumed, value))
        if same is not None:
            return _within(assumed, same.sides)
        if isinstance(first, Padded) and name in _ARGUMENTS:
            # Padding goes with the windows that it was made for; what they leave of it is in pixels of the output.
            call = dict(zip(_ARGUMENTS[name], args, strict=False)) | kwargs
            kernel = _pair(call["weight"].shape[2:] if name == "conv2d" else call["kernel_size"])
            down, across = ((n - 1) * step / 2 for n, step in zip(kernel, _pair(call.get("dilation", 1)), strict=True))
            stride = (grid_size(first.carrier, given[0].value)[0] - 2 * down) / grid_size(assumed, value)[0]
            reaches = (across, across, down, down)
            left = [max(side - reach, 0) / stride for side, reach in zip(first.sides, reaches, strict=True)]
            return _within(assumed, left)
        return assumed

    return follow


def _within(layout: Representation, sides: Sequence[float]) -> Representation:
    """The action of maps with borders, if they have any."""
    left, right, top, bottom = sides
    return Padded(layout, (left, right, top, bottom)) if any(sides) else layout


def commutes(name: str, carrier: Representation, given: int, args: tuple, output: Tensor) -> bool:
    """Whether a call on fields of one kind moves with them, so that its Lie derivative is zero by construction.

    Sums of fields do, and maps of the channels that are the same at every place. (A constant moves as well, but not its
    intensity, and not over an edge to zeros: see where this is used.)

    Args:
        name: Name of the torch function.
        carrier: The action on all its fields.
        given: How many of its tensors depend on the input.
        args: Its arguments.
        output: What it returned.

    Returns:
        Whether it does.
    """
    carrier = carrier.carrier if isinstance(carrier, Padded) else carrier
    if not isinstance(carrier, (Image, ChannelsLast, Tokens)):
        return False
    if name in {"add", "add_", "sub", "sub_"}:
        tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
        return len(tensors) == given and all(arg.shape == output.shape for arg in tensors)
    if name == "conv2d":
        image, weight = args[0], args[1] if len(args) > 1 else None
        return weight is not None and tuple(weight.shape[2:]) == (1, 1) and image.shape[2:] == output.shape[2:]
    if name == "linear":
        return isinstance(carrier, (Tokens, ChannelsLast)) and given == 1
    return name == "batch_norm" and isinstance(carrier, Image)
