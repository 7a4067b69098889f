"""Which rule is for which operation.

An operation that stands in no table, or for which its rule answers ``NotImplemented``, is differentiated on its own.
"""

from __future__ import annotations

from torch.nn import functional as F

from lie_metric.jacobian.carrying import FUSED, IN_PLACE, RULES, WITHOUT_DERIVATIVE
from lie_metric.jacobian.rules import arithmetic, choices, linear, normalisation, pointwise, products, views

__all__: list[str] = []

WITHOUT_DERIVATIVE |= {
    "sign", "floor", "ceil", "round", "trunc", "heaviside", "zeros_like", "ones_like", "empty_like",
    "full_like", "rand_like", "randn_like", "randint_like", "new_zeros", "new_ones", "new_empty", "new_full",
    "new_empty_strided", "argmax", "argmin", "argsort", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset",
    "is_same_size", "size", "stride", "is_contiguous", "device", "layout", "dtype", "isnan", "isinf", "isfinite",
}  # fmt: skip

IN_PLACE.update({"add": arithmetic.addition, "sub": arithmetic.difference})

FUSED.update({
    F.scaled_dot_product_attention: normalisation.attention,
    F.linear: products.linear,
    F.layer_norm: normalisation.layer_norm,
})  # fmt: skip

RULES.update({
    **dict.fromkeys(views.SAME_ORDER, views.same_order),
    **dict.fromkeys(views.COPY, views.copy),
    **dict.fromkeys(linear.LINEAR, linear.linear_in_first),
    **dict.fromkeys(("index_select", "cumsum", "flip", "unfold"), linear.with_axes(1)),
    **dict.fromkeys(("tril", "triu"), linear.of_matrices),
    **{name: linear.folded(axes) for axes, names in linear.FOLDED.items() for name in names},
    **dict.fromkeys((*pointwise.SLOPES, *pointwise.POINTWISE), pointwise.pointwise),
    **dict.fromkeys(("slice", "select", "unbind"), views.along(1)),
    **dict.fromkeys(("split", "split_with_sizes"), views.along(2)),
    **dict.fromkeys(("unsafe_split", "unsafe_split_with_sizes"), views.apart),
    **dict.fromkeys(("mean", "sum"), linear.reduction),
    **dict.fromkeys(("amax", "amin"), linear.largest),
    "linalg_vector_norm": linear.length,
    **dict.fromkeys(("_fft_r2c", "_fft_c2c", "_fft_c2r"), views.along(1)),
    "transpose": views.along(1, 2),
    "diagonal": views.along(2, 3),
    **dict.fromkeys(("mm", "bmm"), products.matmul),
    **dict.fromkeys(("addmm", "baddbmm"), products.matmul_with_addition),
    "_sparse_addmm": products.sparse_product,
    **dict.fromkeys(("cat", "stack"), linear.cat),
    **dict.fromkeys(("masked_scatter", "masked_scatter_backward"), linear.one_by_one),
    **dict.fromkeys(("_softmax", "_safe_softmax"), normalisation.softmax),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), linear.pooled),
    **dict.fromkeys(("fill", "zero"), choices.constant),
    **dict.fromkeys(("_conj", "_neg_view"), views.flipped),
    **dict.fromkeys(("view_as_real", "view_as_complex"), views.other_numbers),
    "expand": views.expand,
    "t": views.transpose,
    "permute": views.permute,
    "as_strided": views.as_strided,
    "constant_pad_nd": linear.padding,
    "roll": linear.with_axes(2),
    "index": linear.indexed,
    "gather": linear.gathered,
    "repeat": linear.repeated,
    "where": choices.where,
    "masked_fill": choices.masked_fill,
    "index_fill": choices.index_fill,
    "copy": choices.written_over,
    "add": arithmetic.addition,
    "sub": arithmetic.difference,
    "rsub": arithmetic.reversed_difference,
    "mul": arithmetic.product,
    "div": arithmetic.quotient,
    "neg": arithmetic.negative,
    "convolution": products.convolution,
    "native_group_norm": normalisation.group_norm,
    "_log_softmax": normalisation.log_softmax,
    "native_dropout": normalisation.dropout,
})  # fmt: skip
