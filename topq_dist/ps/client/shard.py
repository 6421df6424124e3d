"""The part of a model that one server holds: which it is, its gradients and its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from topq_dist.compress.codec.frame import decode_frame, peek_header
from topq_dist.compress.coherence import NO_COHERENCE, measure_coherence, total
from topq_dist.compress.compressor import Compressed, TopKCompressor
from topq_dist.compress.layout import ChunkedVector, Layout, gather_tensors
from topq_dist.compress.native import binding, library
from topq_dist.compress.planned_segments import PlannedSegments
from topq_dist.compress.residual_rates import ResidualRates
from topq_dist.dtypes import accumulate_dtype, bits_of
from topq_dist.ps.model.flat import FlatModel, picked, put, raw_view
from topq_dist.ps.model.spec import ModelSpec, VectorSpec
from topq_dist.ps.protocol.errors import NonFiniteError
from topq_dist.ps.protocol.types import PushRecord


def shard_by_size(sizes_bytes: Mapping[str, int], servers: Sequence[str]) -> dict[str, list[str]]:
    """Return the parameters of each server, by size, as even as whole parameters allow.

    sizes_bytes: bytes of each parameter by name. The result has every server, in the order of
    their addresses as text, each with its parameters in the order of `sizes_bytes`.

    The largest parameter first, each goes to the server that has the fewest bytes so far (Graham's
    longest processing time rule: no server holds more than 4/3 of the best split's largest).
    Equals go by name and address, so that only names, sizes and addresses count: workers that write
    the addresses alike agree, in whatever order they list servers and parameters.

    Raises ValueError for no server, one that comes twice, or fewer parameters than servers.
    """
    if not servers:
        raise ValueError("servers is empty: expected the address of one server at least")
    twice = sorted({server for server in servers if servers.count(server) > 1})
    if twice:
        raise ValueError(f"servers has {', '.join(twice)} twice: expected distinct servers")
    if len(sizes_bytes) < len(servers):
        raise ValueError(
            f"{len(sizes_bytes)} parameters for {len(servers)} servers: expected one parameter for "
            "each server at least"
        )
    held_bytes = dict.fromkeys(sorted(servers), 0)
    held: dict[str, set[str]] = {server: set() for server in held_bytes}
    for name in sorted(sizes_bytes, key=lambda name: (-sizes_bytes[name], name)):
        # empty ones first: a parameter of zero bytes makes no server less empty
        least = min(held_bytes, key=lambda server: (held_bytes[server], len(held[server])))
        held_bytes[least] += sizes_bytes[name]
        held[least].add(name)
    return {server: [name for name in sizes_bytes if name in held[server]] for server in held}


# where tensors are smaller than this on average, they are gathered
_SMALL_NUMEL = 4_096


class Shard:
    """Named parameters, their gradients as flat vectors, and their residuals.

    model: the values that the worker holds; `write_back` puts them into the parameters. rates:
        those that the residuals are counted at, where they follow any.
    """

    def __init__(self, parameters: Mapping[str, Tensor], compressor: TopKCompressor) -> None:
        self.parameters = dict(parameters)
        self.spec = ModelSpec.of(self.parameters.items())
        self.model = FlatModel(self.spec)
        self._marks: list[tuple[int, int]] = []
        self.compressor = compressor
        half = [name for name, one in self.parameters.items() if one.dtype == torch.float16]
        self.rates = ResidualRates(compressor.residuals, half, may_be_refused=True)
        self.read_parameters()
        # gathered gradients, by place of their vector, where they cannot be read where they lie
        self._gathered: dict[int, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """The parameters' names, in order."""
        return list(self.parameters)

    @property
    def raw_bytes(self) -> int:
        """Bytes of the parameters' gradients as they are."""
        return self.spec.raw_bytes

    def _device(self, layout: Layout) -> torch.device:
        devices = {self.parameters[name].device for name in layout.names}
        return devices.pop() if len(devices) == 1 else torch.device("cpu")

    def read_parameters(self) -> None:
        """Take the model's values from the parameters."""
        self.model.copy_from(self.parameters.items())
        self._marks = self._marked()

    def hold(self, values: Mapping[str, Tensor]) -> None:
        """Take the model's values from `values`, by name; the parameters have gone on since."""
        self.model.copy_from((name, values[name]) for name in self.parameters)
        self._marks = []

    def write_back(self, changed: Sequence[Sequence[Tensor]] | None = None) -> None:
        """Put the model's values into the parameters.

        changed: the only places, as Outcome has them, where the model can differ from what the
        parameters were last given; None: anywhere. Where somebody else has written into a parameter
        since, all are.
        """
        if changed is None or self._marks != self._marked() or not self._takes_scatters():
            self.write(self.model.tensors())
        else:
            for update in changed:
                self._scatter(update)
        self._marks = self._marked()

    def _marked(self) -> list[tuple[int, int]]:
        """Return what changes where a parameter is written to, or moved."""
        return [(p._version, p.data_ptr()) for p in self.parameters.values()]

    def _takes_scatters(self) -> bool:
        return all(
            p.is_cpu and p.is_contiguous() and p.numel() == tensor.numel
            for p, tensor in zip(self.parameters.values(), self.spec.tensors, strict=True)
        )

    def _scatter(self, changed: Sequence[Tensor]) -> None:
        for vector, flat, indices in zip(self.spec.vectors, self.model.flats, changed, strict=True):
            parameters = self._parameters_of(vector)
            edges = vector.layout.edges
            places = np.searchsorted(indices.numpy(), edges)
            touched = np.flatnonzero(np.diff(places)).tolist()
            if library.LIBRARY is not None:
                addresses = np.array([p.data_ptr() for p in parameters], np.int64)
                bits, where = bits_of(flat), indices.numpy()
                if not binding.scatter_to_tensors(addresses, edges, bits, where):
                    raise IndexError(f"an index is not in [0, {vector.numel}), or out of order")
            else:
                for at in touched:
                    there = indices[places[at] : places[at + 1]]
                    flat_parameter = parameters[at].detach().view(-1)
                    put(flat_parameter, there - int(edges[at]), picked(flat, there))
            _count_writes([parameters[at] for at in touched])

    def _parameters_of(self, vector: VectorSpec) -> list[Tensor]:
        return [self.parameters[name] for name in vector.layout.names]

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Put other values, by name, into the parameters."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def absent(self) -> list[bool]:
        """Return of each parameter, in order, whether it has no gradient."""
        return [parameter.grad is None for parameter in self.parameters.values()]

    def compress(
        self,
        planned: PlannedSegments,
        *,
        scale: float = 1.0,
        measures_coherence: bool = False,
        absent: Sequence[bool] = (),
    ) -> list[Compressed]:
        """Return the top-Q part of the parameters' gradients / `scale`, plus residuals.

        planned: says what of them that is, all parameters of the model among its tensors.
        absent: the parameters, as `absent` has them, of which nothing is sent, so that their
            residuals stay; any other without a gradient counts as zeros.
        The residuals take what the frames leave out only once they are committed. Raises
        NonFiniteError, naming the first parameter, for NaN or infinity.
        """
        compressed = []
        for place, vector in enumerate(self.spec.vectors):
            left_out = tuple(absent[at] for at in self.spec.places[place]) if any(absent) else ()
            segments = planned.of(vector.layout.names, left_out)
            # many small ones are sooner copied than looked at one by one
            small = vector.numel < _SMALL_NUMEL * len(vector.layout.names)
            in_place = planned.scope == "parameter" and scale == 1.0 and not small
            pieces = self._in_place(vector) if in_place else None
            gradient = pieces or self._gather(place, vector, scale)
            made = self.compressor.compress(gradient, vector.layout, segments)
            if measures_coherence and self.compressor.error_feedback:
                residual = self.compressor.residuals.home(vector.layout)
                found = measure_coherence(gradient, residual, vector.layout)
                # of what the residual adds
                aligned = found.aligned * self.compressor.residual_decay
                made = replace(made, coherence=found._replace(aligned=aligned))
            compressed.append(made)
        for made in compressed:
            if not peek_header(made.frames[0]).finite:
                raise NonFiniteError(
                    f"the gradient of {self._first_non_finite()} holds NaN or infinity: nothing "
                    "was sent"
                )
        return compressed

    def _in_place(self, vector: VectorSpec) -> ChunkedVector | None:
        """Return the gradients where they lie; None unless they can be read as a flat vector."""
        gradients = [self.parameters[name].grad for name in vector.layout.names]
        device = self._device(vector.layout)
        found = [
            gradient.detach().view(-1)
            for gradient in gradients
            if gradient is not None
            and gradient.layout == torch.strided
            and gradient.is_contiguous()
            and not gradient.is_neg()
            and (gradient.dtype, gradient.device) == (vector.dtype, device)
        ]
        return ChunkedVector(found) if len(found) == len(gradients) else None

    def _gather(self, place: int, vector: VectorSpec, scale: float) -> Tensor:
        if place not in self._gathered:
            self._gathered[place] = torch.zeros(
                vector.numel, dtype=vector.dtype, device=self._device(vector.layout)
            )
        flat = self._gathered[place]
        gradients = [parameter.grad for parameter in self._parameters_of(vector)]
        if gather_tensors(gradients, vector.layout, flat):
            return flat if scale == 1.0 else flat.mul_(1.0 / scale)
        for name, where in zip(vector.layout.names, vector.layout.slices(), strict=True):
            parameter = self.parameters[name]
            if parameter.grad is None:
                flat[where].zero_()
                continue
            if parameter.grad.layout != torch.strided:
                raise TypeError(
                    f"the gradient of {name!r} has layout {parameter.grad.layout}: expected a "
                    "dense one, so make the embedding with sparse=False"
                )
            flat[where].view(parameter.shape).copy_(parameter.grad)
        return flat if scale == 1.0 else flat.mul_(1.0 / scale)

    def _first_non_finite(self) -> str:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return repr(name)
        return "a parameter, with what is owed for it,"

    def restore_residual(self, push: PushRecord) -> None:
        """Put back into the residuals what `push` holds, which the server did not take.

        It counts at the rate that it would have counted at then.
        """
        if not self.compressor.error_feedback or not push.frames:
            return
        counted_at = push.counted_at or [0.0] * len(self.names)
        factors = self.rates.factors_since(self.names, counted_at)
        for vector, places, frame in zip(
            self.spec.vectors, self.spec.places, push.frames, strict=True
        ):
            residual = self.compressor.residuals.flat(
                vector.layout,
                dtype=accumulate_dtype(vector.dtype),
                device=self._device(vector.layout),
            )
            decoded = decode_frame(frame, numel=vector.numel)
            of_tensors = torch.tensor([factors[place] for place in places])
            if decoded.finite and not bool((of_tensors == 1).all()):
                tensor = np.searchsorted(vector.layout.edges, decoded.indices.numpy(), "right") - 1
                factor = of_tensors[tensor].to(decoded.values.dtype)
                decoded = replace(decoded, values=decoded.values * factor)
            decoded.add_to(residual)

    def clear_residuals(self) -> None:
        """Forget all residuals, and the rates that they were counted at."""
        self.compressor.residuals.load_state_dict({})
        self.rates.forget()


def _count_writes(parameters: Sequence[Tensor]) -> None:
    """Tell autograd of writes that it has not seen, as it knows of torch's own."""
    try:
        increment_version(parameters)
    except TypeError:
        # a torch that takes one at a time
        for parameter in parameters:
            increment_version(parameter)


def coherence_of(compressed: Sequence[Compressed]) -> tuple[float, ...]:
    """Return a step's coherence as a push carries it: nothing where nothing was measured."""
    coherence = total(made.coherence for made in compressed)
    return tuple(coherence) if coherence.finite and coherence != NO_COHERENCE else ()


def frames_of(compressed: Sequence[Compressed]) -> tuple[memoryview, ...]:
    """Return the bytes of a step's frames, one for each vector."""
    return tuple(raw_view(frame) for made in compressed for frame in made.frames)
