"""What a model must be before it takes the hook: one table, each refusal with its remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from topq_dist.dtypes import FLOATS, check_plain
from topq_dist.module_names import plain_name

# private to torch, and read leniently
_REFUSED_MODES: tuple[tuple[Callable[[Any], Any], str], ...] = (
    (
        lambda ddp: getattr(ddp, "_use_python_reducer", False),
        (
            "ddp_model was made under torch._dynamo.config.optimize_ddp='python_reducer', which "
            "gives hooks no buckets: set optimize_ddp to 'ddp_optimizer', the default, before it "
            "is made"
        ),
    ),
    (
        lambda ddp: getattr(ddp, "mixed_precision", None) is not None,
        (
            "ddp_model was made with mixed_precision=, which has a communication hook of its own: "
            "make it without, and use torch.autocast"
        ),
    ),
    (
        lambda ddp: any(hasattr(p, "_in_backward_optimizers") for p in ddp.parameters()),
        (
            "ddp_model has optimizers that step in the backward pass "
            "(_apply_optimizer_in_backward), which have a communication hook of their own: step "
            "them after it"
        ),
    ),
)


def check_takes_hook(ddp_model: DistributedDataParallel) -> None:
    """Raise ValueError, saying what to do, unless `ddp_model` is in a mode that takes a hook.

    What is wrong here is this rank's own affair: the others may be anywhere.
    """
    for is_so, message in _REFUSED_MODES:
        if is_so(ddp_model):
            raise ValueError(message)
    # private, and read leniently: torch itself says no later, only less clearly
    hooks = getattr(ddp_model, "_comm_hooks", None)
    if hooks:
        name = getattr(hooks[0][0], "__name__", repr(hooks[0][0]))
        raise ValueError(
            f"ddp_model has the communication hook {name!r} already: expected a model without "
            "one, since DistributedDataParallel takes one hook, once"
        )
    if not trainable_names(ddp_model):
        raise ValueError("ddp_model has no trainable parameter: expected one at least")


def check_parameters(module: nn.Module, names: Mapping[Tensor, str]) -> None:
    """Raise TypeError, naming it, for a parameter whose gradient the hook cannot take.

    names: of the trainable ones.
    """
    sparse = sorted(_sparse_gradients(module) & set(names.values()))
    if sparse:
        raise TypeError(
            f"the gradient of {', '.join(sparse)} is sparse: expected dense gradients, "
            "so make the embedding with sparse=False"
        )
    for parameter, name in names.items():
        if is_lazy(parameter):
            raise TypeError(f"{name} has no shape yet: run the model once before it takes the hook")
        check_plain(name, parameter)
        if parameter.dtype not in FLOATS:
            known = ", ".join(str(dtype) for dtype in FLOATS)
            raise TypeError(
                f"{name} has dtype {parameter.dtype}: expected a real floating-point parameter, "
                f"one of {known}"
            )


def exchanged_names(model: nn.Module) -> dict[Tensor, str]:
    """Return the name of each parameter that may be in a bucket: also of those frozen by now.

    DistributedDataParallel goes by what was trainable when it was made. torch.compile's prefix is
    left out, so that a state fits the model compiled or not.
    """
    if isinstance(model, DistributedDataParallel):
        module, ignored = model.module, set(model.parameters_to_ignore)
    else:
        module, ignored = model, set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    names: dict[Tensor, str] = {}
    # module by module, as DistributedDataParallel goes: a tied weight is left out by all its names
    for prefix, child in module.named_modules():
        for own_name, parameter in child.named_parameters(recurse=False):
            # torch compares with the dot, also of the model's own parameters
            if f"{prefix}.{own_name}" not in ignored:
                name = f"{prefix}.{own_name}" if prefix else own_name
                names.setdefault(parameter, plain_name(name))
    return names


def trainable_names(model: nn.Module) -> dict[Tensor, str]:
    """Return the name of each parameter whose gradient the hook is to sparsify."""
    return {p: name for p, name in exchanged_names(model).items() if p.requires_grad}


def _sparse_gradients(module: nn.Module) -> set[str]:
    return {
        plain_name(f"{prefix}.weight" if prefix else "weight")
        for prefix, child in module.named_modules()
        if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.sparse
    }
