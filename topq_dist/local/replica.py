"""One rank's side of local steps, without the others: what it has to send, and what comes of it.

The stages of a round, which a process group, or an emulation of ranks in one process, calls in this
order: `begin`, `compress`, an exchange that puts the mean in place of `Round.vector`, `finish`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from topq_dist.compress.codec.values import WHOLE
from topq_dist.compress.compressor import Compressed, TopKCompressor
from topq_dist.compress.layout import Layout
from topq_dist.compress.sparsify.segments import UniformSegments
from topq_dist.dtypes import accumulate_dtype, zeros
from topq_dist.local.fragment import Fragment, split_in_fragments
from topq_dist.local.settings import LocalSettings
from topq_dist.validation import check_fraction


@dataclass(frozen=True, kw_only=True)
class Round:
    """One fragment's round on one rank.

    vector: (n,), the change of its parameters, or these themselves where `of_parameters`; an
        exchange puts the ranks' mean in its place. launched: (n,), what the parameters were. lent:
        what these are the beginnings of, for the next round. frozen: places of parameters that
        were frozen when it began.
    """

    fragment: int
    vector: Tensor
    of_parameters: bool
    launched: Tensor | None = None
    lent: tuple[Tensor, ...] = ()
    frozen: tuple[int, ...] = ()


class Replica:
    """A rank's fragments, and the compressor with what it has not sent of their changes.

    parameters: the trainable ones by name, dense or DTensors, on one device. q: fraction of each
        parameter's change that is not sent; may be set anew between rounds.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        settings: LocalSettings,
        compressor: TopKCompressor,
        *,
        q: float,
    ) -> None:
        self.q = check_fraction("q", q)
        self.compressor = compressor
        self._keeps_launched = settings.overlap > 0
        wide = any(accumulate_dtype(one.dtype) == torch.float64 for one in parameters.values())
        self._dtype = torch.float64 if wide else torch.float32
        # of whole parameters, so that the ranks of all shards have the same fragments
        numels = {name: one.numel() for name, one in parameters.items()}
        self.fragments = [
            Fragment(
                {name: parameters[name] for name in names},
                settings.outer,
                dtype=self._dtype,
                blend=settings.blend,
            )
            for names in split_in_fragments(numels, settings.fragments)
        ]
        self._segments = UniformSegments()
        # vectors that no round uses, each large enough for any fragment
        self._spare: list[Tensor] = []

    def layout(self, fragment: int) -> Layout:
        """Return what a fragment's vectors are made up of."""
        return self.fragments[fragment].layout

    def begin(self, fragment: int, parameters: Tensor | None = None) -> Round:
        """Return a round of a fragment, whose parameters may go on to change.

        parameters: what they were when it first began, for one that a saved run had under way.
        """
        mine = self.fragments[fragment]
        # of a saved one that had begun, inner steps have been taken since
        keeps_launched = self._keeps_launched or parameters is not None
        lent = tuple(self._take() for _ in range(1 + keeps_launched))
        vector, *rest = (flat[: mine.layout.numel] for flat in lent)
        launched = rest[0] if rest else None
        now = mine.gather(vector if launched is None else launched)
        if parameters is not None:
            now.copy_(parameters)
        of_parameters = self._is_lossless() and mine.can_average_parameters()
        if not of_parameters:
            mine.change_of(now, out=vector)
        elif launched is not None:
            vector.copy_(launched)
        return Round(
            fragment=fragment,
            vector=vector,
            of_parameters=of_parameters,
            launched=launched,
            lent=lent,
            frozen=mine.frozen(),
        )

    def _take(self) -> Tensor:
        """Return a vector of any content for a round of any fragment, until it is over."""
        if self._spare:
            return self._spare.pop()
        largest = max(one.layout.numel for one in self.fragments)
        return zeros(largest, self._dtype, self.fragments[0].outer.device)

    def release(self, begun: Round) -> None:
        """Take back the vectors of a round that is over: finished, or void."""
        self._spare += begun.lent

    def compress(self, begun: Round, *, parts: int = 1) -> Compressed:
        """Return the frames of the largest of decay * residual + change; change neither.

        The residual becomes decay * residual + change - sent by the update alone.
        """
        mine = self.fragments[begun.fragment]
        segments = self._segments.of(mine.numels, q=self.q, scope="parameter")
        return self.compressor.compress(begun.vector, mine.layout, segments, parts=parts)

    def finish(self, begun: Round) -> None:
        """Take a step of the outer optimizer, and have the parameters take it up.

        The round's vector holds the mean by now.
        """
        mine = self.fragments[begun.fragment]
        mine.step_outer(begun.vector, of_parameters=begun.of_parameters, frozen=begun.frozen)
        mine.take_up(begun.launched)
        self.release(begun)

    def _is_lossless(self) -> bool:
        value_format = self.compressor.value_format
        if self.q > 0.0:
            return False
        return value_format is None or (
            value_format in WHOLE and WHOLE[value_format].itemsize >= self._dtype.itemsize
        )
