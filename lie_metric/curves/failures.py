"""What becomes of a measurement that fails while a model trains."""

from __future__ import annotations

from typing import Literal

from lie_metric.warning import warn

__all__ = ["OnError", "report", "validate_on_error"]

OnError = Literal["warn", "raise"]


def validate_on_error(on_error: object) -> None:
    """Refuses what is neither "warn" nor "raise"."""
    if on_error not in {"warn", "raise"}:
        raise ValueError(f"`on_error` must be 'warn' or 'raise', got {on_error!r}.")


def report(what: str, error: Exception | None, on_error: OnError) -> None:
    """Tells that something could not be measured.

    Args:
        what: That something could not be, as a beginning of a sentence.
        error: Why; None if it was on another process.
        on_error: ``"warn"``, or ``"raise"``.

    Raises:
        RuntimeError: If ``on_error`` is ``"raise"``.

    Warns:
        UserWarning: Otherwise.

    Example:
        >>> report("It could not be measured", ValueError("Too small."), "raise")
        Traceback (most recent call last):
        RuntimeError: It could not be measured, it failed with ValueError: Too small.
    """
    reason = "on another process"
    if error is not None:
        reason = f"with {type(error).__name__}: {str(error).removesuffix('.')}"
    message = f"{what}, it failed {reason}."
    if on_error == "raise":
        raise RuntimeError(message) from error
    warn(f"{message} It is logged as NaN and training goes on; `on_error='raise'` stops it.")
