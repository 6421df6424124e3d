"""From frames to the mean of their dense vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.codec.frame import Buffer, Frame, decode_frame
from topq_dist.compress.kernels import LANES, sum_terms
from topq_dist.compress.kernels.scratch import scratch
from topq_dist.compress.partition import BlockCyclicPartition
from topq_dist.dtypes import FLOATS, accumulate_dtype

# elements added up in one go: they stay in a core's second cache
_WINDOW_NUMEL = 16_384


def average(frames: Sequence[Buffer], *, out: Tensor) -> Tensor:
    """Write the mean of the frames' dense vectors into `out`, and return it.

    `out` is contiguous, of any shape and float dtype. The terms are divided first and added in
    the order of the frames, as DistributedDataParallel does with dense gradients. Raises
    FrameError, leaving `out` as it was, for bytes that are no frame of out.numel() elements.
    """
    check_out(out)
    frames_read = [decode_frame(frame, numel=out.numel()) for frame in frames]
    return write_sum(frames_read, divisor=len(frames), out=out)


def sparse_mean(frames: Sequence[Frame]) -> Frame:
    """Return the mean of the finite frames' vectors: an element wherever it is not zero.

    The terms are divided and added as in `average`, in fp32, or fp64 where a frame has that. The
    frames are used up. An element may be infinite, where frames hold numbers close to the largest.
    Raises IndexError for an index that is out of range.
    """
    numel, count = frames[0].numel, len(frames)
    dtype = max((frame.values.dtype for frame in frames), key=lambda dtype: dtype.itemsize)
    if sum(frame.values.numel() for frame in frames) > numel:
        # a dense sum takes less room
        dense = write_sum(frames, divisor=count, out=torch.empty(numel, dtype=dtype))
        where = dense.nonzero().flatten()
        return Frame(numel=numel, indices=where, values=dense[where], finite=True)
    terms = [frame.values.to(dtype).div_(count).numpy() for frame in frames]
    ends = np.array([one.size for one in terms], np.int64)
    window = scratch.block(dtype)[:_WINDOW_NUMEL]
    # a sum that is not zero is one whose bits are not: there are no negative zeros among them
    bits = window.view(f"i{window.itemsize}")
    indices = np.empty(int(ends.sum()) + LANES, dtype=np.int64)
    sums = np.empty(indices.size, dtype=terms[0].dtype)
    found = sum_terms(
        [frame.indices.numpy() for frame in frames],
        terms,
        np.zeros(count, np.int64),
        ends,
        numel,
        window.view(sums.dtype),
        bits,
        bits.dtype.type(1),
        indices,
        sums.view(bits.dtype),
    )
    if found < 0:
        raise IndexError(f"an index of a frame is out of order, or not in [0, {numel})")
    return Frame(
        numel=numel,
        indices=torch.from_numpy(indices[:found]),
        values=torch.from_numpy(sums[:found]),
        finite=True,
    )


def decode_partition(frames: Sequence[Buffer], *, numel: int) -> list[Frame]:
    """Read the frames of all parts of a vector of `numel` elements, as frames of the vector.

    See BlockCyclicPartition. Raises FrameError.
    """
    partition = BlockCyclicPartition(numel=numel, count=len(frames))
    decoded = [
        decode_frame(frame, numel=partition.numel_of(part)) for part, frame in enumerate(frames)
    ]
    return [
        Frame(
            numel=numel,
            indices=partition.to_global(part, frame.indices),
            values=frame.values,
            finite=frame.finite,
        )
        for part, frame in enumerate(decoded)
    ]


def write_sum(frames: Sequence[Frame], *, divisor: int, out: Tensor) -> Tensor:
    """Write the sum of the frames' dense vectors, each divided by `divisor`, into `out`.

    `out` is as in `average`. The frames are used up: their values are divided in place.
    """
    flat = out.view(-1)
    # half precision would round once a frame
    whole = flat.dtype == accumulate_dtype(flat.dtype) or len(frames) == 1
    total = flat.zero_() if whole else torch.zeros_like(flat, dtype=accumulate_dtype(flat.dtype))
    for frame in frames:
        frame.values.div_(divisor)
        frame.add_to(total)
    if total is not flat:
        flat.copy_(total)
    return out


def sum_exceeds(frames: Sequence[Frame], *, divisor: float, limit: float) -> bool:
    """Return whether an element of what `write_sum` makes of finite frames is beyond `limit`.

    The frames are left as they are.
    """
    largest = [float(frame.values.abs().max()) for frame in frames if frame.values.numel()]
    if sum(largest) <= limit * divisor:
        # no need to add them up, as a rule
        return False
    copies = [replace(frame, values=frame.values.clone()) for frame in frames]
    dtype = max((frame.values.dtype for frame in frames), key=lambda dtype: dtype.itemsize)
    total = write_sum(copies, divisor=1, out=torch.empty(frames[0].numel, dtype=dtype))
    return bool((total.abs() > limit * divisor).any())


def check_out(out: Tensor) -> None:
    """Raise ValueError, or TypeError for no tensor, unless `out` can take a dense gradient."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out is a {type(out).__name__}: expected a tensor")
    if out.dtype not in FLOATS or out.layout != torch.strided or out.is_meta:
        raise ValueError(
            f"out has dtype {out.dtype} and layout {out.layout} on {out.device}: expected a dense "
            f"tensor of one of {', '.join(str(dtype) for dtype in FLOATS)}"
        )
    if not out.is_contiguous() or out.requires_grad:
        raise ValueError(
            f"out has dtype {out.dtype}, strides {out.stride()} and requires_grad="
            f"{out.requires_grad}: expected a contiguous float tensor that needs no gradient"
        )
