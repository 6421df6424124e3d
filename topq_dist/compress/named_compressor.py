"""Named gradients to frames and back, for who has a transport of their own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from topq_dist.compress.aggregate import average
from topq_dist.compress.codec.frame import Buffer
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.layout import Layout
from topq_dist.dtypes import check_plain
from topq_dist.sparsity import at_least_one
from topq_dist.validation import check_fraction


class Compressor:
    """Compresses named gradients to frames and back: for users with a transport of their own.

    q: fraction of each gradient that is not sent, in [0, 1]; at least one element is, unless q is
        1. May be set anew between gradients.
    value_format: how the values sent travel: "fp32", "fp16", "bf16", "int8", "int4", "int2",
        "fp64", or entropy-coded "ec1", "ec2", "ecfp16", "ecbf16".
    error_feedback: keep what was not sent and add it to the next gradient of the same name.
    bound: send no magnitude above so many times the mean of those sent with it, and keep what is
        clipped; None: no bound. Only with error feedback; what is half sent or more is not
        clipped.

    With error feedback it takes room for a residual of each name, and each thread that compresses
    for one more, the largest, and for 12 bytes for each of the candidates: four times as many as
    are sent, or fewer. Raises TypeError or ValueError for a value out of place, naming it.
    """

    def __init__(
        self,
        *,
        q: float = 0.99,
        value_format: str = "fp16",
        error_feedback: bool = True,
        bound: float | None = None,
    ) -> None:
        self.q = check_fraction("q", q)
        self._flat = TopKCompressor(
            value_format=value_format, error_feedback=error_feedback, bound=bound
        )
        self._layouts: dict[str, Layout] = {}

    def compress(self, name: str, gradient: Tensor) -> Tensor:
        """Return the frame of the top-Q part of `gradient` plus the residual of `name`.

        gradient: dense, of any shape and float dtype. The frame is a 1-D uint8 tensor on the CPU.
        Raises TypeError for what is no name or gradient, ValueError where `name` has a residual of
        another shape. Without error feedback there is none, and a shape may change.
        """
        if not isinstance(name, str):
            raise TypeError(f"name={name!r}: expected a string")
        if not isinstance(gradient, Tensor):
            raise TypeError(f"gradient is a {type(gradient).__name__}: expected a tensor")
        check_plain("gradient", gradient)
        k = at_least_one(check_fraction("q", self.q), gradient.numel())
        layout = self._layouts.get(name)
        if layout is None or layout.shapes[0] != gradient.shape:
            layout = Layout(names=(name,), shapes=(tuple(gradient.shape),))
        frame = self._flat.compress_and_update(_flat(gradient), layout, k)
        self._layouts[name] = layout
        return frame

    def decompress(self, frame: Buffer, out: Tensor) -> Tensor:
        """Write the dense gradient of `frame` into `out`, zeros included, and return it.

        Raises FrameError for bytes that are no frame of `out`'s number of elements; `out` is then
        as it was.
        """
        if not out.is_meta:
            check_plain("out", out)
        return average([frame], out=out)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the residuals by name."""
        return self._flat.residuals.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the residuals by those of `state`."""
        self._flat.residuals.load_state_dict(state)


def _flat(gradient: Tensor) -> Tensor:
    flat = gradient.detach()
    # expanded and lazily negated gradients are dense too, but not as memory has them; to ask is
    # cheaper than to call what would do nothing
    if flat.is_neg():
        flat = flat.resolve_neg()
    return flat if flat.dim() == 1 and flat.is_contiguous() else flat.reshape(-1).contiguous()
