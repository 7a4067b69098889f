"""Lie derivatives as a term of the training loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lie_metric.binding import Generators, resolve_for, sample_count, split_parts
from lie_metric.functional.sums import grouped, moments, spread, totals
from lie_metric.lie import linearise
from lie_metric.options import Options
from lie_metric.representations import Representation

__all__ = ["equivariance_penalty"]

Normalisation = Literal["none", "spread"]


def equivariance_penalty(
    model: Callable[..., Any],
    images: Any,
    generators: Generators = ("translation", "rotation"),
    *,
    normalise: Normalisation = "spread",
    **options: Any,
) -> Tensor:
    r"""The mean square of the Lie derivative, a penalty that training can lower by gradient descent.

    .. math:: P = \frac1K \sum_k E_x \|L_k f(x)\|^2 / E_x \|f(x) - E f\|^2

    With ``normalise="spread"`` it is the mean of squared :func:`relative` errors. Numerator and denominator are both
    differentiated, so that shrinking the outputs, which would end in a constant network, does not lower it. With "none"
    the denominator is dim f, and P is the mean :func:`lee`, which shrinking does lower.

    The model is run in evaluation mode (running statistics of batch norm, no dropout) and in full precision; modes,
    buffers and random states are left as they were. Gradients flow to the parameters.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W), at least two for "spread", or inputs that ``input_representation`` is of. A part of
            the training batch is enough.
        generators: As in :func:`lie_metric.lie_derivative`. The cost grows with the number that they span.
        normalise: "spread" or "none".
        options: Further arguments of :func:`lie_metric.lie_derivative`. Of outputs with named parts, such as energies
            and forces, P is the mean of what each part would have.

    Returns:
        A number of no axes, differentiable with respect to the parameters. Add it to the loss with a weight:
        squared relative errors of an untrained network may be 100, so begin with 0.01.

    Raises:
        ValueError: If ``normalise`` is unknown, a spread is asked of one image, or derivatives by differences, which
            are constants to autograd.
        RuntimeError: If gradients are disabled.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> penalty = equivariance_penalty(model, torch.rand(4, 1, 4, 4), "translation")
        >>> penalty.backward()
        >>> model[1].weight.grad.shape
        torch.Size([3, 16])
    """
    if normalise not in get_args(Normalisation):
        raise ValueError(f"`normalise` must be one of {get_args(Normalisation)}, got {normalise!r}.")
    chosen = Options.of(options)
    if chosen.method == "difference":
        raise ValueError(
            "`method` must not be 'difference' for a penalty, got it: a difference of outputs has no gradient that "
            "training could follow to a right derivative. Leave the method out, or only measure the model."
        )
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "`equivariance_penalty` must be called with gradients enabled, got a disabled gradient mode. Measure with "
            "`lie_metric.functional.relative` where no gradient is needed."
        )
    layout = chosen.input_representation
    if normalise == "spread" and sample_count(images, layout) == 1:
        raise ValueError("`images` must be at least two for a spread, got one. Pass more, or `normalise='none'`.")
    result = linearise(model, images, resolve_for(generators, layout), chosen)
    values = split_parts(result.representation, result.output)
    changes = split_parts(result.representation, result.lie_derivatives)
    terms = [
        found.square().mean() if normalise == "none" else _over_spread(f, found, representation)
        for (_, representation, f), (_, _, found) in zip(values, changes, strict=True)
    ]
    return torch.stack(terms).mean()


def _over_spread(f: Tensor, found: Tensor, representation: Representation) -> Tensor:
    rows = moments(f, representation)
    parts = grouped(rows, range(len(rows["square"])))
    parts["rounding"] = torch.tensor(torch.finfo(f.dtype).eps, dtype=torch.float64)
    denominator = spread(totals(parts))
    if not bool(torch.isfinite(denominator.detach())):
        raise ValueError(
            "`images` must lead to finite outputs that differ by more than rounding, got outputs without a spread. Use "
            "`normalise='none'`, or other images."
        )
    return found.square().flatten(1).sum(1).mean() / denominator.to(found.dtype)
