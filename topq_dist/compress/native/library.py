"""The shared library of compiled kernels, where it has been built, and pointers into arrays."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from ctypes import CDLL, addressof, c_char, c_double, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_ABI = 3
# what kernels return of a width that they have not
_UNKNOWN = -9
# what some write beside what they return
PAIR = c_int64 * 2
_SUFFIX = {"win32": "dll", "darwin": "dylib"}.get(sys.platform, "so")
INT64, FLOAT32, UINT8, UINT16 = (np.dtype(name) for name in ("int64", "float32", "uint8", "uint16"))

# what is returned and what is given, a letter each: pointers, whole numbers, fp32, fp64, nothing
_TYPES = {"p": c_void_p, "n": c_int64, "f": c_float, "d": c_double, "-": None}
_SIGNATURES = {
    "find_reaching": "n nppnnnppnnpp",
    "keep_largest": "n nppnnpppp",
    "select_segments": "n nppnpnppppppp",
    "find_differing": "n nppnpn",
    "update_residual_span": "n nppnnppnnppppn",
    "sum_terms": "n nppppnnpnppn",
    "scatter_add": "n npnppn",
    "gaps_between": "n npnnp",
    "sums_of_quotients": "n npnnpn",
    "write_gaps": "n npnnppp",
    "read_gaps": "n pnpnpnnpnp",
    "round_to_half": "- pnfpp",
    "widen_half": "n pnfp",
    "split_halves": "- pnnpp",
    "join_halves": "- ppnnp",
    "encode_blocks": "n ppnnppp",
    "decode_blocks": "n pnpnnpn",
    "encode_levels": "n ppndppppp",
    "decode_levels": "n pnpnppnpn",
    "write_symbols": "n pnpp",
    "read_symbols": "n pnpn",
    "bound_rows": "n npppndp",
    "split_indices": "- pnnpnpp",
    "indices_of_part": "- pnnnnp",
    "gather_tensors": "- ppnp",
    "scatter_to_tensors": "n nppnppn",
}


def library_path() -> Path:
    """Return where the library is, or would be: TOPQ_NATIVE_LIBRARY, else beside this file."""
    named = os.environ.get("TOPQ_NATIVE_LIBRARY")
    return Path(named) if named else Path(__file__).with_name(f"_topq_kernels.{_SUFFIX}")


def load(path: Path) -> CDLL:
    """Return the library with its argument lists; raises OSError for one that does not fit."""
    library = CDLL(str(path))
    try:
        for name, signature in _SIGNATURES.items():
            returned, given = signature.split()
            function = getattr(library, f"topq_{name}")
            function.restype = _TYPES[returned]
            function.argtypes = [_TYPES[letter] for letter in given]
    except AttributeError as error:
        raise OSError(f"{path}: {error}") from error
    abi = library.topq_abi()
    if abi != _ABI:
        raise OSError(f"{path} has argument lists of version {abi}: expected {_ABI}")
    return library


def _load_if_there() -> tuple[CDLL | None, str]:
    """Return the library, or None and why there is none."""
    path = library_path()
    if os.environ.get("TOPQ_NATIVE") == "0":
        return None, "TOPQ_NATIVE=0"
    if not path.exists():
        return None, f"{path} has not been built"
    try:
        return load(path), ""
    except OSError as error:
        return None, str(error)


LIBRARY, WHY_NOT = _load_if_there()

# a view of no bytes finds an array's memory five times as fast as array.ctypes does
_view_of: Callable[[Any], c_char] = (c_char * 0).from_buffer  # type: ignore[assignment]


def written(array: Array, dtype: np.dtype[Any]) -> int:
    """Return the address of a contiguous array of this dtype that can be written to."""
    if array.dtype is not dtype and array.dtype != dtype:
        raise TypeError(f"an array of {array.dtype}: expected {dtype}")
    return addressof(_view_of(array))


def read(array: Array, dtype: np.dtype[Any]) -> int:
    """Return the address of a contiguous array of this dtype."""
    if array.dtype is not dtype and array.dtype != dtype:
        raise TypeError(f"an array of {array.dtype}: expected {dtype}")
    try:
        return addressof(_view_of(array))
    except TypeError:
        # not to be written to
        if not array.flags.c_contiguous:
            raise
        address: int = array.__array_interface__["data"][0]
        return address


def addresses(arrays: Sequence[Array], dtype: np.dtype[Any]) -> ctypes.Array[c_int64]:
    """Return the addresses of contiguous arrays of this dtype."""
    return (c_int64 * len(arrays))(*(read(array, dtype) for array in arrays))


def check_kind(dtype: np.dtype[Any], kinds: str) -> None:
    """Raise TypeError unless a dtype is of one of these kinds, as numpy has them."""
    if dtype.kind not in kinds:
        raise TypeError(f"an array of {dtype}: expected one of kind {' or '.join(kinds)}")


def known(status: int, dtype: np.dtype[Any]) -> int:
    """Return what a kernel has returned; raises TypeError where it knows no such width."""
    if status == _UNKNOWN:
        raise TypeError(f"an array of {dtype}: there is no kernel for its width")
    return status
