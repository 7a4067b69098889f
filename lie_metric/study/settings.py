"""What the values of a study depend on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from lie_metric.algebra import generators as resolve
from lie_metric.functional.local_equivariance import LeeOutput
from lie_metric.resampling import Resampling
from lie_metric.study.sources import selection

__all__ = ["LIE_MEASURES", "MEASURES", "Framing", "Settings"]

LIE_MEASURES = ("relative", "lee", "sensitivity")
MEASURES = (*LIE_MEASURES, "accuracy", "consistency")


@dataclass(frozen=True)
class Framing:
    """How images are cut and normalised, where the models' own data configs shall not decide.

    Args:
        input_size: Height and width, to which the largest part of each image that has this shape is scaled (bicubic),
            whatever crop a model's config asks for; None is what the config says, or else the images as they are.
        mean: Subtracted from values in [0, 1], one number or one for each channel; None as above, or else nothing.
        std: What they are divided by then.
        channels: 1 for grey, 3 for RGB; None as above, or else grey where all images of the set are.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> Framing((32, 32), mean=(0.17,), std=(0.32,), channels=1).std
        (0.32,)
    """

    input_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        size = self.input_size
        if size is not None and (len(size) != 2 or not all(isinstance(one, int) and one > 0 for one in size)):
            raise ValueError(f"`input_size` must be a positive height and width, got {size!r}. Give e.g. 224 224.")
        if self.channels not in {None, 1, 3}:
            raise ValueError(f"`channels` must be 1 (grey) or 3 (RGB), got {self.channels!r}.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is None:
                continue
            if len(values) not in ({1, 3} if self.channels is None else {1, self.channels}):
                raise ValueError(
                    f"`{name}` must be one number or one for each channel, got {len(values)} numbers"
                    + (f" for {self.channels} channels." if self.channels else ".")
                )
            if not all(math.isfinite(one) and (name == "mean" or one > 0) for one in values):
                need = "finite" if name == "mean" else "positive"
                raise ValueError(f"`{name}` must be {need}, of values in [0, 1], got {list(values)!r}.")


@dataclass(frozen=True)
class Settings:
    """What the values of a study depend on; recorded in its folder, and the same whenever it goes on.

    Args:
        data: ``"digits"``, ``"synthetic"``, ``"folder:PATH"`` or a set of torchvision.
        num_images: Images whose Lie derivatives are taken; the first of those evaluated.
        eval_images: Images of accuracy and consistency; at least ``num_images``.
        generators: Names or groups, e.g. ``("affine",)``.
        measures: Among ``relative``, ``lee``, ``sensitivity``, ``accuracy`` and ``consistency``.
        lee_output: What ``lee`` is of: ``"output"``, logits as all others; ``"probabilities"`` or ``"auto"``, see
            :class:`~lie_metric.LocalEquivarianceError`.
        framing: Size, channels and normalisation of the images instead of the models' own.
        output: Which tensor of what models return is measured and classifies: ``"logits"``, found by itself;
            ``"probabilities"``, the softmax of it; the name of an entry or attribute, or its number, e.g. ``"pred"`` or
            ``"1"``; or a function of what is returned, as ``"module:callable"`` or ``"file.py:callable"``.
        layerwise: Images of the attribution by type of operation; 0 leaves it out.
        probes: Random probes of the attribution's squared norms for each image.
        resampling: The stencil.
        max_shift: Largest shift of ``consistency`` along each axis, in halves of the shorter side.
        pretrained: Whether timm models come with pretrained weights.
        seed: Draws the images, the noise, the shifts and the probes.

    Raises:
        ValueError: If a value is out of range or unknown.
    """

    data: str
    num_images: int = 256
    eval_images: int = 1024
    generators: tuple[str, ...] = ("affine",)
    measures: tuple[str, ...] = MEASURES
    layerwise: int = 0
    probes: int = 8
    resampling: Resampling = field(default_factory=Resampling)
    max_shift: float = 0.125
    pretrained: bool = True
    seed: int = 0
    lee_output: LeeOutput = "output"
    framing: Framing = field(default_factory=Framing)
    output: str = "logits"

    def __post_init__(self) -> None:
        for name, least in (("num_images", 2), ("eval_images", self.num_images), ("layerwise", 0), ("probes", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"`seed` must be a non-negative integer, got {self.seed!r}.")
        if self.layerwise > self.num_images:
            raise ValueError(f"`layerwise` must be at most `num_images` ({self.num_images}), got {self.layerwise}.")
        if not 0 < self.max_shift <= 1:
            raise ValueError(f"`max_shift` must be in (0, 1] half sides, got {self.max_shift!r}.")
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown or not self.measures:
            raise ValueError(f"`measures` must be among {', '.join(MEASURES)}, got {list(self.measures)!r}.")
        if self.lee_output not in get_args(LeeOutput):
            raise ValueError(f"`lee_output` must be one of {get_args(LeeOutput)}, got {self.lee_output!r}.")
        resolve(self.generators)
        selection(self.output)

    @property
    def names(self) -> tuple[str, ...]:
        """The generators of a finished model's rows; one empty name if no Lie derivative is asked for."""
        if not any(name in self.measures for name in LIE_MEASURES):
            return ("",)
        return tuple(generator.name for generator in resolve(self.generators))

    def record(self, fingerprint: str) -> dict[str, Any]:
        """The settings as they are written down and compared.

        Args:
            fingerprint: That of the images; it stands for a folder's path, which may differ between machines.

        Returns:
            Names and values that JSON can hold.
        """
        record = asdict(self) | {"data": self.data.partition(":")[0], "fingerprint": fingerprint, "format": 3}
        return record | {"generators": list(self.names), "measures": sorted(self.measures)}
