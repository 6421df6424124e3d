"""The compiled kernels are there for all tests of this folder, or compiled for them."""

from __future__ import annotations

import pytest
from native_build import compile_kernels, compilers

from topq_dist.compress.native import binding, codec_binding, library


@pytest.fixture(scope="package", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have the bindings call the library that there is, or one built of the sources."""
    if library.LIBRARY is not None:
        return
    if not compilers():
        pytest.skip("neither a library nor a compiler")
    out = tmp_path_factory.mktemp("native") / "kernels.so"
    built = compile_kernels(compilers()[0], out, "-shared", "-fPIC")
    assert not built.returncode, built.stderr
    binding._LIBRARY = codec_binding._LIBRARY = library.load(out)
