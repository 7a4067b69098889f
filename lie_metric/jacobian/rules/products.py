"""Products of matrices, convolutions and linear layers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lie_metric.jacobian.carrying import Dual, plain, wrap
from lie_metric.jacobian.rules.arguments import count_of

__all__ = ["convolution", "linear", "matmul", "matmul_with_addition", "sparse_product"]


def _matrix_product(first: Any, second: Any) -> Tensor:
    """Tangents of the product of two matrices, or of two batches of them, of which at least one moves."""
    tangents = None
    if isinstance(first, Dual):
        moved = first.tangents
        if moved.ndim == 3:  # one larger matrix
            tangents = (moved.flatten(0, 1) @ plain(second)).unflatten(0, moved.shape[:2])
        else:
            tangents = moved @ plain(second)
    if isinstance(second, Dual):
        matrix = plain(first)
        if matrix.layout == torch.strided:
            other = matrix @ second.tangents
        else:  # sparse matrices have no batches: the columns of all tangents are one matrix
            moved = second.tangents
            other = (matrix @ moved.transpose(0, 1).flatten(1)).unflatten(1, moved.shape[::2]).transpose(0, 1)
        tangents = other if tangents is None else tangents.add_(other)
    return cast(Tensor, tangents)


def matmul(func: Any, args: tuple, kwargs: dict) -> Any:
    """A product of two matrices, or of two batches of them."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    return wrap(func(plain(args[0]), plain(args[1])), _matrix_product(*args))


def matmul_with_addition(func: Any, args: tuple, kwargs: dict) -> Any:
    """The same, and something that is at rest besides."""
    added, first, second = args
    if isinstance(added, Dual) or kwargs:
        return NotImplemented
    return wrap(func(added, plain(first), plain(second)), _matrix_product(first, second))


def sparse_product(func: Any, args: tuple, kwargs: dict) -> Any:
    """A sparse matrix, which does not move, times a dense one, and something that is at rest besides."""
    added, matrix, dense = args
    if isinstance(added, Dual) or isinstance(matrix, Dual):
        return NotImplemented
    value = func(added, matrix, dense.value, **kwargs)
    return wrap(value, kwargs.get("alpha", 1) * _matrix_product(matrix, dense))


def convolution(func: Any, args: tuple, kwargs: dict) -> Any:
    """The tangents are a larger batch, without the bias."""
    dual, weight, bias, *rest = args
    if isinstance(weight, Dual) or isinstance(bias, Dual):
        return NotImplemented
    value = func(dual.value, weight, bias, *rest)
    tangents = func(dual.tangents.flatten(0, 1), weight, None, *rest)
    return wrap(value, tangents.unflatten(0, (count_of(dual), len(dual))))


def linear(func: Any, args: tuple, kwargs: dict) -> Any:
    """A linear layer as a whole: the tangents are a larger batch, without the bias."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    dual, weight, bias = given["input"], given["weight"], given.get("bias")
    if type(dual) is not Dual or isinstance(weight, Dual) or isinstance(bias, Dual) or torch.is_grad_enabled():
        return NotImplemented
    return wrap(func(dual.value, weight, bias), func(dual.tangents, weight, None))
