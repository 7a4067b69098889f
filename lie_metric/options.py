"""What of a model is measured, how its tensors move, and by which method: the options that all measures share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch import Tensor
from typing_extensions import Self

from lie_metric.jacobian import Method
from lie_metric.jacobian.methods import METHODS
from lie_metric.representations import Representation
from lie_metric.resampling import Resampling

__all__ = ["Function", "Layout", "Options", "Output"]

Output = Literal["logits", "probabilities"] | Callable[[Any], Tensor]
Function = str | Callable[..., Any]
Layout = Representation | Mapping[str, Representation]


@dataclass(frozen=True, eq=False)
class Options:
    """The options of a measurement, refused where they have no meaning, before there is a model.

    Args:
        output: As in :func:`lie_metric.lie_derivative`.
        function: As in :func:`lie_metric.lie_derivative`.
        input_representation: As in :func:`lie_metric.lie_derivative`.
        output_representation: As in :func:`lie_metric.lie_derivative`.
        resampling: As in :func:`lie_metric.lie_derivative`.
        method: As in :func:`lie_metric.lie_derivative`.
        chunk_size: As in :func:`lie_metric.lie_derivative`.

    Raises:
        TypeError: If an option is of the wrong kind.
        ValueError: If an option is out of range.

    Example:
        >>> print(Options(output="probabilities").stencil)
        bspline, reflection, pixel areas
    """

    output: Output = "logits"
    function: Function | None = None
    input_representation: Layout | None = None
    output_representation: Layout | None = None
    resampling: Resampling | None = None
    method: str = "auto"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.output) and self.output not in {"logits", "probabilities"}:
            raise ValueError(f"`output` must be 'logits', 'probabilities' or a callable, got {self.output!r}.")
        function, chunk_size = self.function, self.chunk_size
        if function is not None and not callable(function) and not (isinstance(function, str) and function):
            raise TypeError(
                f"`function` must be the name of a method, a callable or None, got {function!r}. Pass e.g. 'encode', "
                "or `lambda model, images: model(images, steps=4)`."
            )
        for name, value in (
            *_parts_of("input_representation", self.input_representation),
            *_parts_of("output_representation", self.output_representation),
        ):
            if value is not None and (isinstance(value, type) or not isinstance(value, Representation)):
                raise TypeError(
                    f"`{name}` must be a representation, got {value!r}. Pass an instance such as "
                    "`lie_metric.representations.Image()`."
                )
        if self.resampling is not None and not isinstance(self.resampling, Resampling):
            raise TypeError(
                f"`resampling` must be a `Resampling`, got {self.resampling!r}. Pass e.g. Resampling('bspline')."
            )
        # How a measurement went can be asked for again by the name that it bears in results.
        if self.method not in {*get_args(Method), *METHODS}:
            raise ValueError(f"`method` must be one of {get_args(Method)}, got {self.method!r}.")
        if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int)):
            raise TypeError(f"`chunk_size` must be an integer or None, got {chunk_size!r}.")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}. None chooses.")

    @classmethod
    def of(cls, given: Mapping[str, Any], *, without: Sequence[str] = (), beside: Sequence[str] = ()) -> Self:
        """The options given, and the defaults of all others.

        Args:
            given: Options by name.
            without: Those that the measure at hand has not.
            beside: Further arguments that it has, for the message.

        Returns:
            The options.

        Raises:
            TypeError: If an option is unknown.

        Example:
            >>> Options.of({"chunk_size": 2}).chunk_size
            2
        """
        known = [field.name for field in fields(cls) if field.name not in without]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise TypeError(f"`options` must be among {sorted([*known, *beside])}, got {unknown}.")
        return cls(**given)

    @property
    def whole_output(self) -> Representation | None:
        """How the output moves as one tensor, for measures of one output; None to infer it.

        Raises:
            TypeError: If its parts are named.
        """
        found = self.output_representation
        if isinstance(found, Mapping):
            raise TypeError(
                f"`output_representation` must be one representation for this measure, got the parts {list(found)}. "
                f"Choose one, e.g. `output=lambda returned: returned[{next(iter(found), 'energy')!r}]`."
            )
        return found

    @property
    def stencil(self) -> Resampling:
        """That of ``resampling``, or the default."""
        return Resampling() if self.resampling is None else self.resampling


def _parts_of(name: str, layout: Any) -> list[tuple[str, Any]]:
    """A representation, or those of named parts, by what they are called."""
    if isinstance(layout, Mapping):
        wrong = [key for key in layout if not isinstance(key, str) or not key or "/" in key]
        if wrong:
            raise ValueError(
                f"`{name}` must have names without '/', by which results are reported, got {wrong}. An entry of a "
                "tuple is named by its index, e.g. '0', and a deeper one with dots."
            )
        return [(f"{name}[{key!r}]", value) for key, value in layout.items()]
    return [(name, layout)]
