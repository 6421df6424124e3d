"""Keeping what the receivers did not get, once a step is sure to count."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

from topq_dist.compress.blocks import (
    BLOCK_NUMEL,
    Floats,
    Indices,
    as_summand,
    bits_of,
    blocks,
    check_vectors,
    spans,
)
from topq_dist.compress.kernels import scatter_add, settle_span
from topq_dist.compress.workers import run_all


class Terms(NamedTuple):
    """Sparse vectors to be added up: `indices` and `values` of one after the other.

    The n-th lies from edges[n] to edges[n + 1], its indices ascending.
    """

    indices: Indices
    values: Floats
    edges: Indices


_NO_TERMS = Terms(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(1, np.int64))


def settle(
    residual: Tensor,
    gradient: Tensor,
    indices: Tensor,
    rest: Tensor,
    *,
    replace_by: Terms | None = None,
) -> None:
    """residual += gradient, then residual[indices] = rest: what the receivers did not get.

    `residual` and `gradient` are those of the selection, `indices` (ascending) and `rest` on any
    device; `rest` is of the residual's dtype, the selected values less what they decode to. With
    `replace_by` the gradient becomes the sum of those terms: on the CPU only, and all of one dtype.
    Raises ValueError, having changed nothing, for anything else, and where the first or the last
    index of any of them is out of range.
    """
    check_vectors(gradient, residual)
    if residual.device.type != "cpu":
        if replace_by is not None:
            raise ValueError(f"replace_by with a gradient on {gradient.device}: expected the CPU")
        residual += gradient
        residual.index_copy_(0, indices.to(residual.device), rest.to(residual.device))
        return
    _check_range(indices.numpy(), residual.numel())
    if replace_by is not None:
        kinds = {gradient.numpy().dtype, residual.numpy().dtype, replace_by.values.dtype}
        if len(kinds) > 1:
            raise ValueError(f"replace_by with {kinds}: expected one dtype")
        for low, high in pairwise(replace_by.edges.tolist()):
            _check_range(replace_by.indices[low:high], residual.numel())
    vectors = residual.detach(), gradient.detach(), indices.numpy(), rest.numpy(), replace_by
    run_all([partial(_settle, *vectors, *span) for span in spans(residual.numel(), BLOCK_NUMEL)])


def add_terms(out: Tensor, terms: Terms) -> None:
    """Add up sparse vectors in `out`; raises ValueError where an index is out of range."""
    if terms.indices.size and not scatter_add(out.numpy(), terms.indices, terms.values):
        raise ValueError(f"an index is not in [0, {out.numel()})")


def _check_range(indices: Indices, numel: int) -> None:
    if indices.size and (indices[0] < 0 or indices[-1] >= numel):
        raise ValueError(f"indices from {indices[0]} to {indices[-1]}: expected [0, {numel})")


def _settle(
    residual: Tensor,
    gradient: Tensor,
    indices: Indices,
    rest: Floats,
    replace_by: Terms | None,
    start: int,
    stop: int,
) -> None:
    owed, bits = residual.numpy(), bits_of(gradient)
    same = gradient.dtype == residual.dtype
    terms = _NO_TERMS if replace_by is None else replace_by
    for at, end in blocks(start, stop, max(1, stop - start) if same else BLOCK_NUMEL):
        mine = slice(*np.searchsorted(indices, (at, end)))
        places = [
            low + np.searchsorted(terms.indices[low:high], (at, end))
            for low, high in pairwise(terms.edges.tolist())
        ]
        next_term, ends = np.array(places, np.int64).reshape(-1, 2).T.copy()
        if not settle_span(
            owed[at:end],
            as_summand(bits[at:end], gradient.dtype, residual.dtype),
            at,
            indices[mine],
            rest[mine],
            replace_by is not None,
            terms.indices,
            terms.values,
            next_term,
            ends,
        ):
            raise ValueError("indices do not ascend: some of what is owed has not been kept")
