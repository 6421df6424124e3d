"""Triton's interpreter, ready for tests: import this before anything that imports triton.

It runs the kernels on CPU tensors, by numpy. Which of both a process does, that or compile, is
decided once and for all when the kernels are imported. TOPQ_TEST_DEVICE=cuda has the same tests run
on a GPU.
"""

from __future__ import annotations

import math
import os
from functools import cache
from typing import Any, NamedTuple

DEVICE = os.environ.get("TOPQ_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402
from triton import language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.jit import mangle_type  # noqa: E402
from triton_version import check_interpreter  # noqa: E402

if DEVICE == "cpu":
    check_interpreter()


class Launch(NamedTuple):
    """One launch of a kernel: what the compiler would have been told, and how many programs.

    types: of each argument, as the compiler writes them. constants: those that are compiled in.
    """

    module: str
    name: str
    grid: tuple[int, ...]
    types: dict[str, str]
    constants: dict[str, int]
    warps: int


LAUNCHES: list[Launch] = []
# where it is set, launches are noted and nothing is run
DRY = [False]
_patch_lang = interpreter._patch_lang


def _patched_once(function: Any) -> Any:
    """Prepare the language for a function, once and for good: nothing is compiled in this process.

    The interpreter does and undoes it for every launch, and for every call of a function within a
    kernel, which takes most of its time.
    """
    languages = [one for one in (tl, tl.core) if one in function.__globals__.values()]
    if any(tl.core.is_builtin(language.load) for language in languages):
        _patch_lang(function)
    return interpreter._LangPatchScope()


def _noted_launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    constants = {name: options[name] for name in self.arg_names if name in options}
    given = dict(zip(self.arg_names, args, strict=False))
    # a one is compiled in
    ones = {name: 1 for name, one in given.items() if type(one) is int and one == 1}
    types = {name: mangle_type(one) for name, one in given.items() if name not in ones}
    constants |= ones
    warps = options.get("num_warps", 4)
    LAUNCHES.append(Launch(self.fn.__module__, self.__name__, grid, types, constants, warps))
    if DRY[0]:
        return None
    with _disable_current_modes():
        return _run(self, *args, grid=grid, warmup=warmup, **options)


_execute = interpreter.GridExecutor.__call__


def _execute_quietly(self: Any, *args: Any, **kwargs: Any) -> None:
    with np.errstate(all="ignore"):
        _execute(self, *args, **kwargs)


@cache
def _sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.constexpr(math.prod(shape)), tl.core.tuple([tl.constexpr(one) for one in shape])


def _tensor(self: Any, handle: Any, type: Any) -> None:  # noqa: A002 - its name there
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _sizes(type.shape if type.is_block() else ())


def _block_type(self: Any, element_ty: Any, shape: Any) -> None:
    self.element_ty, self.name = element_ty, "block"
    self.shape = tuple(getattr(one, "value", one) for one in shape)
    self.numel = math.prod(self.shape)


_number_type = cache(interpreter._get_np_dtype)
_addresses = np.dtype(np.uint64)


def _array_type(kind: Any) -> Any:
    number = kind.scalar
    return _addresses if number.is_ptr() else _number_type(number)


_pair = interpreter.interpreter_semantic.binary_op_type_checking_impl
_ALIKE = {tl.int32, tl.int64, tl.float32, tl.float64}


def _paired(lhs: Any, rhs: Any, *rest: Any, **options: Any) -> Any:
    # nothing to convert, and nothing to spread
    if (
        type(lhs) is type(rhs) is tl.tensor
        and lhs.shape is rhs.shape
        and not lhs.dtype.is_ptr()
        and lhs.dtype in _ALIKE
        and lhs.dtype == rhs.dtype
    ):
        return lhs, rhs
    return _pair(lhs, rhs, *rest, **options)


interpreter.interpreter_semantic.binary_op_type_checking_impl = _paired
# what it makes anew for each operation is most of its time
tl.core.tensor.__init__ = _tensor
tl.core.block_type.__init__ = _block_type
interpreter._get_np_dtype = _array_type
_run = interpreter.InterpretedFunction.run
interpreter.InterpretedFunction.run = _noted_launch
interpreter._patch_lang = _patched_once
# numbers that are not finite are no news to a kernel
interpreter.GridExecutor.__call__ = _execute_quietly
# a check of each sum and product, which takes half of the rest
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
