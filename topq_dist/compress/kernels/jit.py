"""What the kernels are made with: numba's compiler, and vector instructions that it does not know.

A mask says of LANES elements at once which are meant, a bit for each.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

# elements whose bits are looked at together: as many as a mask of one word holds
LANES = 64
# what divides the address of memory that is written past the caches
STREAM_ALIGNMENT = 64


def compiled(function: F) -> F:
    """Return `function` as machine code, kept beside it or in the user's cache where there is one.

    The cache is renewed when the function's file changes or one beside this, and no other: what a
    kernel calls lives in any of them.
    """
    try:
        kernel: F = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no folder that it may write to
        kernel = njit(nogil=True)(function)
    else:
        _never_fail(kernel)
        _renew_with_this_room(kernel)
    return kernel


def _renew_with_this_room(kernel: Any) -> None:
    """Have numba, which looks at the kernel's own file, look at those beside this one too."""
    file = kernel._cache._cache_file
    # not in an archive, where nothing changes, nor with a numba that keeps it elsewhere
    with suppress(OSError, AttributeError):
        here = [found.stat() for found in sorted(Path(__file__).parent.glob("*.py"))]
        stamps = [(found.st_mtime, found.st_size) for found in here]
        file._source_stamp = file._source_stamp, *stamps


def _never_fail(kernel: Any) -> None:
    """Make a cache file that cannot be read count as none, and one that cannot be written as well.

    A power cut leaves empty ones; a disk is full long after numba has looked at the folder.
    """
    cache = kernel._cache
    load, save = cache.load_overload, cache.save_overload

    def load_or_nothing(*args: Any) -> Any:
        try:
            return load(*args)
        except Exception:  # noqa: BLE001 - what unpickling damaged bytes raises has no end
            with suppress(OSError):
                cache.flush()
            return None

    def save_or_not(*args: Any) -> None:
        with suppress(OSError):
            save(*args)

    cache.load_overload, cache.save_overload = load_or_nothing, save_or_not


def _mask_of(lanes: int) -> Any:
    """Return an intrinsic: which of `lanes` elements from `at` on reach the key `low`, as bits.

    An element is first[at], or the sum with second[at]; its key are its bits without the sign. With
    `before` the sum is written to `second`, and what was there to `before`.
    """

    @intrinsic
    def mask(_: Any, first: Any, second: Any, before: Any, at: Any, low: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            place = args[3]
            bits = _load(context, builder, first, args[0], place, lanes)
            width = first.dtype.bitwidth
            keys = ir.VectorType(ir.IntType(width), lanes)
            if second is not types.none:
                summand = _load(context, builder, second, args[1], place, lanes)
                bits = builder.fadd(bits, summand)
                if before is not types.none:
                    _store(context, builder, second, args[1], place, bits)
                    _store(
                        context, builder, before, args[2], place, summand, streaming=lanes == LANES
                    )
                bits = builder.bitcast(bits, keys)
            magnitudes = builder.and_(bits, ir.Constant(keys, [(1 << (width - 1)) - 1] * lanes))
            reached = builder.icmp_signed(">=", magnitudes, _spread(builder, args[4], keys))
            return _word(builder, reached, lanes)

        return types.uint64(first, second, before, at, low), generate

    return mask


def _differing_of(lanes: int) -> Any:
    """Return an intrinsic: in which of `lanes` integers from `at` on vectors differ, as bits."""

    @intrinsic
    def differing(_: Any, first: Any, second: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            ours = _load(context, builder, first, args[0], args[2], lanes)
            theirs = _load(context, builder, second, args[1], args[2], lanes)
            return _word(builder, builder.icmp_signed("!=", ours, theirs), lanes)

        return types.uint64(first, second, at), generate

    return differing


def _load(context: Any, builder: Any, array_type: Any, array: Any, at: Any, lanes: int) -> Any:
    vector = ir.VectorType(context.get_data_type(array_type.dtype), lanes)
    address = _address(context, builder, array_type, array, at, vector)
    return builder.load(address, align=array_type.dtype.bitwidth // 8)


def _store(
    context: Any,
    builder: Any,
    array_type: Any,
    array: Any,
    at: Any,
    value: Any,
    streaming: bool = False,
) -> None:
    """Write a vector; `streaming` past the caches, to an address that STREAM_ALIGNMENT divides."""
    address = _address(context, builder, array_type, array, at, value.type)
    align = STREAM_ALIGNMENT if streaming else array_type.dtype.bitwidth // 8
    store = builder.store(value, address, align=align)
    if streaming:
        # or each line would be read first, which costs as much as the read of a gradient
        once = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        store.set_metadata("nontemporal", once)


def _address(context: Any, builder: Any, array_type: Any, array: Any, at: Any, vector: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def _spread(builder: Any, scalar: Any, vector: Any) -> Any:
    places = ir.VectorType(ir.IntType(32), vector.count)
    unset = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(unset, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, unset, ir.Constant(places, [0] * vector.count))


def _word(builder: Any, flags: Any, lanes: int) -> Any:
    word = builder.bitcast(flags, ir.IntType(lanes))
    return word if lanes == LANES else builder.zext(word, ir.IntType(LANES))


@intrinsic
def lowest_bit(_: Any, word: Any) -> Any:
    """Return the place of the lowest bit that is set, in [0, LANES); of none, any in that range."""

    def generate(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place = builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))
        return builder.and_(place, ir.Constant(ir.IntType(64), LANES - 1))

    return types.int64(types.uint64), generate


@intrinsic
def count_bits(_: Any, word: Any) -> Any:
    def generate(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


reached_by_64, reached_by_one = _mask_of(LANES), _mask_of(1)
differing_64, differing_one = _differing_of(LANES), _differing_of(1)
