"""Velocities with which generators move content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lie_metric.algebra import Generator, flow_rows, velocity
from lie_metric.figures.canvas import COLOURS, matplotlib_parts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["vector_field"]


def vector_field(
    generators: Generator | Sequence[Generator], image: Tensor | None = None, *, titles: Sequence[str] | None = None
) -> Figure:
    """The velocities with which generators move the content of an image or of space, one panel for each.

    Convention:
        T_t reads the image at exp(tA)p, so the content at p moves with the velocity -Ap: the arrows (of projective
        generators -Ap + (w·p) p). x points right, y points down, the origin is the image centre and 1 is half of the
        shorter side. In space z points away, and the unit is that of the data. Arrows of different panels are not to
        one scale.

    Args:
        generators: One or several, of two or of three dimensions, e.g. ``lm.Generator.combination("least",
            metric.generators, directions[0])``.
        image: Shape (C, H, W) or (H, W), drawn below the arrows; the first channel unless there are three. The default
            is an empty square. None in space.
        titles: Headings; the default are the generators' names.

    Returns:
        A figure.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there is nothing to draw, the image has other axes, the titles are not one for each, or
            generators are of several dimensions, or of others than two and three.

    Example:
        >>> from lie_metric import generators
        >>> figure = vector_field(generators("rotation", "saturation"), torch.rand(1, 8, 12))
        >>> [axis.get_title() for axis in figure.axes]
        ['rotation', 'saturation']
    """
    asked = (generators,) if isinstance(generators, Generator) else tuple(generators)
    headings = [generator.name for generator in asked] if titles is None else list(titles)
    if not asked or len(headings) != len(asked):
        raise ValueError(
            f"`generators` must hold at least one, and `titles` one for each, got {len(asked)} and {len(headings)}."
        )
    dimensions = sorted({generator.dimension for generator in asked})
    if dimensions not in ([2], [3]):
        raise ValueError(
            f"`generators` must all be of two dimensions, or all of three, got {dimensions}. Draw those of each "
            "dimension by themselves."
        )
    if image is not None and (image.ndim not in {2, 3} or dimensions == [3]):
        raise ValueError(
            f"`image` must have axes (C, H, W) or (H, W), and be None for generators of space, got shape "
            f"{tuple(image.shape)} for generators of {dimensions[0]} dimensions."
        )
    _, Figure, FigureCanvasAgg = matplotlib_parts()
    picture = torch.zeros(1, 1, 1) if image is None else image.detach().cpu().float().reshape(-1, *image.shape[-2:])
    height, width = picture.shape[-2:]
    size = width / min(height, width), height / min(height, width)
    figure = Figure(figsize=(3.2 * len(asked) * size[0] / size[1], 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    kind = {"projection": "3d"} if dimensions == [3] else {}
    axes = figure.subplots(1, len(asked), squeeze=False, subplot_kw=kind)[0]
    for axis, generator, heading in zip(axes, asked, headings, strict=True):
        if dimensions == [3]:
            _draw_space(axis, generator)
        else:
            _draw_plane(axis, generator, picture if image is not None else None, size)
        axis.set_title(heading, fontsize=10)
        axis.tick_params(labelsize=7)
    return figure


def _draw_plane(axis: Any, generator: Generator, picture: Tensor | None, size: tuple[float, float]) -> None:
    """Arrows of the plane over an image of a size in half sides."""
    half_width, half_height = size
    count = 15
    x = torch.linspace(-1, 1, count) * half_width * (1 - 1 / count)
    y = torch.linspace(-1, 1, count) * half_height * (1 - 1 / count)
    points = torch.stack([x.expand(count, count), y[:, None].expand(count, count), torch.ones(count, count)], dim=-1)
    if picture is not None:
        low, high = picture.min(), picture.max()
        shown = (picture - low) / (high - low).clamp(min=1e-12)
        shown = shown.movedim(0, -1) if len(shown) == 3 else shown[0]
        extent = (-half_width, half_width, half_height, -half_height)
        axis.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent, alpha=0.6)
    arrows = -velocity(torch.tensor(flow_rows(generator)), points)
    if bool(arrows.any()):
        axis.quiver(*points[..., :2].unbind(-1), *arrows.unbind(-1), angles="xy", color=COLOURS[2], pivot="mid")
    axis.set(xlim=(-half_width, half_width), ylim=(half_height, -half_height), aspect="equal")
    axis.set_xlabel(f"intensities × exp({generator.intensity:.2g} t)" if generator.intensity else "", fontsize=8)


def _draw_space(axis: Any, generator: Generator) -> None:
    """Arrows of space: x to the right, y down, z away."""
    count = 5
    line = torch.linspace(-1, 1, count)
    points = torch.cartesian_prod(line, line, line)
    arrows = -(torch.nn.functional.pad(points, (0, 1), value=1.0) @ torch.tensor(generator.matrix).mT)
    longest = arrows.norm(dim=1).max()
    if longest > 0:
        arrows = arrows * (2 / (count - 1) / longest)
        # Matplotlib's axes are to the right, away and up; the last is turned over.
        (x, y, z), (u, v, w) = points.unbind(1), arrows.unbind(1)
        axis.quiver(*(part.numpy() for part in (x, z, y, u, w, v)), color=COLOURS[2], pivot="middle", linewidth=1)
    axis.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(1, -1), xlabel="x", ylabel="z", zlabel="y", box_aspect=(1, 1, 1))
    axis.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1), zticks=(-1, 0, 1))
    for label in (axis.xaxis, axis.yaxis, axis.zaxis):
        label.labelpad = -6
