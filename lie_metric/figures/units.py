"""Units of the group parameter, in words."""

from __future__ import annotations

__all__ = ["UNITS", "unit_of"]


UNITS: dict[str, str] = {
    "translation_x": "half side",
    "translation_y": "half side",
    "rotation": "radian",
    "hyperbolic_rotation": "rapidity",
    "scale": "log factor",
    "shear_x": "slope",
    "shear_y": "slope",
    "stretch_x": "log factor",
    "stretch_y": "log factor",
    "perspective_x": "inverse half side",
    "perspective_y": "inverse half side",
    "saturation": "log factor",
}
"""The unit of the group parameter of each named generator."""


def unit_of(generator: str, *, pixels: bool = True) -> str:
    """The unit of a generator's parameter, in words.

    Args:
        generator: Its name.
        pixels: Whether it moves images, whose unit of length is half of a side; points have a unit of their own.

    Returns:
        The unit; ``"unit of t"`` for a generator that is not named by this library.

    Example:
        >>> unit_of("translation_x"), unit_of("translation_x", pixels=False), unit_of("rotation_z"), unit_of("spiral")
        ('half side', 'unit of length', 'radian', 'unit of t')
    """
    kind = generator.split("_")[0]
    if not pixels and kind in _OF_LENGTH:
        return _OF_LENGTH[kind]
    return UNITS.get(generator) or _UNITS_IN_SPACE.get(kind, "unit of t")


_OF_LENGTH = {"translation": "unit of length", "perspective": "inverse unit of length"}

_UNITS_IN_SPACE = {
    "translation": "half side",
    "rotation": "radian",
    "hyperbolic": "rapidity",
    "shear": "slope",
    "stretch": "log factor",
    "boost": "unit of velocity",
    "brightness": "range of values",
    "contrast": "log factor",
    "chroma": "log factor",
    "hue": "radian",
    "blur": "squared pixel",
}
