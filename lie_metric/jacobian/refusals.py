"""What tangents carried by tensors cannot follow."""

from __future__ import annotations

from typing import ClassVar

__all__ = ["NumberTaken", "Unsupported", "WrittenInto"]


class Unsupported(RuntimeError):
    """A function does something that tangents carried by tensors cannot follow."""


class NumberTaken(Unsupported):
    """A number is taken out of torch.

    Attributes:
        happened: Whether it was in this run: a function may catch the error and go on as if nothing had happened.
    """

    happened: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__("a number is taken out of torch (`.item()`, `float()`)")
        NumberTaken.happened = True


class WrittenInto(Unsupported):
    """Tangents come into a tensor that carries none: it must carry some from its beginning."""
