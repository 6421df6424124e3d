"""The loops over whole gradients, at the speed of memory: compiled C, or numpy where there is none.

Whole-array operations pass over a vector once for every thing they do to it; C passes once for all,
without Python's lock. Both give the same bits. `topq_kernels.h` says what each kernel takes. Sizes
are for callers to check; where what came over a wire decides where to read or write, the kernel
itself looks.
"""

import logging

from topq_dist.compress.native import library, numpy_codec, numpy_kernels, numpy_symbols
from topq_dist.compress.native.binding import (
    bound_rows,
    find_differing,
    find_reaching,
    indices_of_part,
    keep_largest,
    scatter_add,
    select_segments,
    split_indices,
    sum_terms,
    update_residual_span,
)
from topq_dist.compress.native.codec_binding import (
    decode_blocks,
    decode_levels,
    encode_blocks,
    encode_levels,
    gaps_between,
    join_halves,
    read_gaps,
    read_symbols,
    round_to_half,
    split_halves,
    sums_of_quotients,
    widen_half,
    write_gaps,
    write_symbols,
)

__all__ = [
    "bound_rows",
    "decode_blocks",
    "decode_levels",
    "encode_blocks",
    "encode_levels",
    "find_differing",
    "find_reaching",
    "gaps_between",
    "indices_of_part",
    "join_halves",
    "keep_largest",
    "read_gaps",
    "read_symbols",
    "round_to_half",
    "scatter_add",
    "select_segments",
    "split_halves",
    "split_indices",
    "sum_terms",
    "sums_of_quotients",
    "update_residual_span",
    "widen_half",
    "write_gaps",
    "write_symbols",
]

# elements that are looked at together: lists need room for as many more than they are to hold
LANES = 64
# what divides the address of memory that is written past the caches
STREAM_ALIGNMENT = 64

if library.LIBRARY is None:
    logging.getLogger(__name__).warning(
        "gradients are compressed by numpy: as exactly as by the compiled kernels, but slower (%s)",
        library.WHY_NOT,
    )
    _by_numpy = vars(numpy_kernels) | vars(numpy_codec) | vars(numpy_symbols)
    globals().update({name: _by_numpy[name] for name in __all__})
