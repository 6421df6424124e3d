"""Long bytes <-> the chunks in which they travel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise

from topq_dist.ps.protocol.errors import InvalidError, TooLargeError
from topq_dist.ps.protocol.types import CHUNK_BYTES, MAX_CHUNK_BYTES
from topq_dist.ps.wire.buffer_pool import BufferPool


def chunks(buffers: Iterable[memoryview], chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Yield what is in `buffers`, one behind the other, in pieces of `chunk_bytes`.

    The last piece may be shorter. Pieces of one buffer are views of it.
    """
    started: list[memoryview] = []
    started_bytes = 0
    for buffer in buffers:
        view = buffer.cast("B")
        while view.nbytes:
            piece = view[: chunk_bytes - started_bytes]
            view = view[piece.nbytes :]
            started.append(piece)
            started_bytes += piece.nbytes
            if started_bytes == chunk_bytes:
                yield _joined(started)
                started, started_bytes = [], 0
    if started:
        yield _joined(started)


def _joined(pieces: Sequence[memoryview]) -> memoryview:
    return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))


class Receiver:
    """Takes chunks into one buffer of a size that was declared, and agreed to, before.

    sizes: bytes of each part. limit_bytes: of all parts together. what: names it in errors.
    pool: where the memory comes from.

    Raises TooLargeError for more than `limit_bytes`, before anything is allocated.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        limit_bytes: int,
        what: str,
        pool: BufferPool | None = None,
    ) -> None:
        self._what = what
        self._edges = [0, *accumulate(sizes)]
        total = self._edges[-1]
        if total > limit_bytes:
            raise TooLargeError(f"{what} of {total} bytes: expected at most {limit_bytes}")
        try:
            # memory that nothing has written to yet costs nothing, so a declaration alone does not
            self._buffer = (pool or BufferPool()).acquire(total).data
        except MemoryError as error:
            raise TooLargeError(f"{what} of {total} bytes: more than there is memory") from error
        self._received = 0

    @property
    def complete(self) -> bool:
        """Whether all that was declared is there."""
        return self._received == self._edges[-1]

    def take(self, chunk: bytes | memoryview) -> None:
        """Add the next chunk; raises InvalidError where it is empty, too long, or not due."""
        end = self._received + len(chunk)
        if not chunk:  # there could be any number of them
            raise InvalidError(f"an empty message in {self._what}: expected chunks of its bytes")
        if len(chunk) > MAX_CHUNK_BYTES:
            raise InvalidError(
                f"a chunk of {len(chunk)} bytes in {self._what}: expected at most {MAX_CHUNK_BYTES}"
            )
        if end > self._edges[-1]:
            raise InvalidError(
                f"{self._what} goes on after the {self._edges[-1]} bytes that it declared"
            )
        self._buffer[self._received : end] = chunk
        self._received = end

    def parts(self) -> tuple[memoryview, ...]:
        """Return the parts, writable views of one buffer; raises InvalidError for a short one."""
        if not self.complete:
            raise InvalidError(
                f"{self._what} ended after {self._received} of {self._edges[-1]} bytes"
            )
        return tuple(self._buffer[start:stop] for start, stop in pairwise(self._edges))
