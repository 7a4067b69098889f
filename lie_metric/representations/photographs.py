"""Normalised photographs, and the changes of their colours: brightness, contrast, chroma, hue, blur."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lie_metric.algebra import PERSPECTIVE, Generator, horizon, matrix_exponential
from lie_metric.representations.fields import Image
from lie_metric.resampling import Resampling, working_precision

__all__ = ["Photograph"]

_COLOURS = ("brightness", "chroma", "hue")
_PHOTOMETRIC = frozenset({"contrast", "blur", *_COLOURS})


@dataclass(frozen=True, init=False, repr=False)
class Photograph(Image):
    r"""Images (B, 3, H, W) of red, green and blue, normalised as (r - mean) / std, with r from 0 to 1.

    They move as :class:`Image` does, and read the charges of the photometric generators. Of r, with its grey
    g = (1, 1, 1) · r / 3 at each pixel and the mean m of g over the image:

    ==============  ==================  ========================================================
    charge          X · r               t
    ==============  ==================  ========================================================
    ``brightness``  1                   added to r
    ``contrast``    r - m               log factor about the mean grey, which stays
    ``chroma``      r - g               log factor of colourfulness; 0 at t → -∞, a grey image
    ``hue``         k × r               radians about the grey axis k = (1, 1, 1) / √3
    ``blur``        Δr / 2              variance of a Gaussian in squared pixels; mirrored at the borders
    ==============  ==================  ========================================================

    Values are not clipped to 0 and 1, as they would be by an augmentation.

    Args:
        mean: Mean of each channel, by which images were normalised.
        std: Standard deviation of each channel.

    Raises:
        ValueError: If there are not three of each, or a deviation is not positive.

    Example:
        >>> import torch, lie_metric as lm
        >>> photo = Photograph((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        >>> photo.tangents(torch.zeros(1, 3, 4, 4), lm.generators("brightness"), lm.Resampling()).unique().tolist()
        [4.0]
        >>> grey = torch.rand(1, 1, 4, 4).expand(1, 3, 4, 4)  # has no hue
        >>> bool(photo.tangents(grey, lm.generators("hue"), lm.Resampling()).abs().max() < 1e-6)
        True
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __init__(
        self,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        means, deviations = (tuple(float(entry) for entry in given) for given in (mean, std))
        if len(means) != 3 or len(deviations) != 3 or min(deviations) <= 0:
            raise ValueError(
                f"`mean` and `std` must hold three numbers, those of `std` positive, got {mean!r} and {std!r}. Pass "
                "what the images were normalised by; the defaults are those of ImageNet."
            )
        object.__setattr__(self, "mean", means)
        object.__setattr__(self, "std", deviations)

    def __repr__(self) -> str:
        return f"Photograph(mean={self.mean}, std={self.std})"

    @property
    def charges(self) -> frozenset[str]:  # type: ignore[override]
        """Intensity, perspectives and the photometric charges."""
        return frozenset({"intensity", *PERSPECTIVE}) | _PHOTOMETRIC

    def check(self, tensor: Tensor, name: str) -> None:
        """Accepts (B, 3, H, W).

        Raises:
            ValueError: If there are not three channels.
        """
        super().check(tensor, name)
        if tensor.shape[1] != 3:
            raise ValueError(
                f"`{name}` must have three channels, red, green and blue, got shape {tuple(tensor.shape)}. Pass "
                "`Image()` for images of other channels, which have no colours to change."
            )

    def tangents(self, tensor: Tensor, generators: Sequence[Generator], resampling: Resampling) -> Tensor:
        """The infinitesimal actions, shape (K, B, 3, H, W)."""
        moved = super().tangents(tensor, generators, resampling)
        if not any(_PHOTOMETRIC & generator.charges.keys() for generator in generators):
            return moved
        wide = working_precision(tensor)
        raw = self._raw(wide)
        found = []
        for generator, each in zip(generators, moved, strict=True):
            change, charges = torch.zeros_like(raw), generator.charges
            if any(charges.get(name) for name in _COLOURS):
                matrix = _colours(generator).to(raw)
                change = change + torch.einsum("ij,bjhw->bihw", matrix[:, :3], raw) + matrix[:, 3, None, None]
            if charges.get("contrast"):
                change = change + charges["contrast"] * (raw - raw.mean((1, 2, 3), keepdim=True))
            if charges.get("blur"):
                rows, columns = (_second_difference(size).to(raw) for size in raw.shape[2:])
                change = change + charges["blur"] / 2 * (rows @ raw + raw @ columns)
            found.append(each + (change / self._column(raw, self.std)).to(each.dtype))
        return torch.stack(found)

    def act(self, tensor: Tensor, generator: Generator, t: float | Tensor, resampling: Resampling) -> Tensor:
        """The transformed tensor, by exact one-parameter groups; a negative blur sharpens.

        Raises:
            ValueError: If contrast or blur come with another change of colours, blur with one of scale, or an intensity
                with brightness, contrast, chroma or hue: these do not commute.
        """
        charges = generator.charges
        _refuse_mixed(generator)
        if len({name for name in charges if name in {"contrast", "blur"}}) + any(n in _COLOURS for n in charges) > 1:
            raise ValueError(
                f"`generators` must have contrast or blur alone for finite transforms, got {generator.name!r} with "
                f"{sorted(charges)}, which do not commute. Measure one after the other."
            )
        moved = super().act(tensor, generator, t, resampling)
        if not _PHOTOMETRIC & charges.keys():
            return moved
        wide = working_precision(moved)
        raw = self._raw(wide)
        step = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1)
        if any(name in _COLOURS for name in charges):
            matrix = torch.nn.functional.pad(_colours(generator), (0, 0, 0, 1))
            turned = matrix_exponential(step * matrix)[:, :3].to(raw)
            raw = (
                torch.einsum("bij,bjhw->bihw", turned[..., :3].expand(len(raw), 3, 3), raw) + turned[..., 3, None, None]
            )
        if charges.get("contrast"):
            mean = raw.mean((1, 2, 3), keepdim=True)
            raw = mean + (step * charges["contrast"]).exp()[..., None].to(raw) * (raw - mean)
        if charges.get("blur"):
            for axis, size in ((-2, raw.shape[-2]), (-1, raw.shape[-1])):
                kernel = matrix_exponential(step * charges["blur"] / 2 * _second_difference(size)).to(raw)[:, None]
                raw = kernel @ raw if axis == -2 else raw @ kernel.mT
        return ((raw - self._column(raw, self.mean)) / self._column(raw, self.std)).to(tensor.dtype)

    def _raw(self, tensor: Tensor) -> Tensor:
        """Values from 0 to 1."""
        return tensor * self._column(tensor, self.std) + self._column(tensor, self.mean)

    @staticmethod
    def _column(like: Tensor, values: Sequence[float]) -> Tensor:
        return like.new_tensor(values)[:, None, None]


def _refuse_mixed(generator: Generator) -> None:
    """Refuses motions and intensities that do not commute with the changes of colours beside them."""
    charges, square = generator.charges, [row[:-1] for row in generator.matrix]
    turns = all(square[i][j] == -square[j][i] for i in range(len(square)) for j in range(len(square)))
    mixed = None
    if charges.get("blur") and (not turns or horizon(generator)):
        mixed = "a blur, whose width is in pixels, with a change of scale"
    elif generator.intensity and any(charges.get(name) for name in (*_COLOURS, "contrast")):
        mixed = "an intensity, of normalised values, with a change of colours"
    if mixed:
        raise ValueError(
            f"`generators` must not mix {mixed} for finite transforms, got {generator.name!r}: they do not commute. "
            "Measure one after the other."
        )


def _colours(generator: Generator) -> Tensor:
    """The affine map of a pixel's colours at which brightness, chroma and hue change them, shape (3, 4)."""
    grey = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    turn = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / 3**0.5
    rates = [generator.charges.get(name, 0.0) for name in ("chroma", "hue", "brightness")]
    square = rates[0] * (torch.eye(3, dtype=torch.float64) - grey) + rates[1] * turn
    return torch.cat([square, torch.full((3, 1), rates[2], dtype=torch.float64)], dim=1)


def _second_difference(size: int) -> Tensor:
    """The matrix of x(i - 1) - 2 x(i) + x(i + 1), the ends mirrored at the outer edges of their pixels."""
    one = torch.ones(size - 1, dtype=torch.float64)
    matrix = one.diag(1) + one.diag(-1)
    return matrix - matrix.sum(1).diag()
