"""What a model must be before it takes the hook."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel


def check_takes_hook(ddp_model: DistributedDataParallel) -> None:
    """Raise unless `ddp_model` is a DistributedDataParallel model without a hook.

    What is wrong here is this rank's own affair: the others may be anywhere.
    """
    if not isinstance(ddp_model, DistributedDataParallel):
        raise TypeError(
            f"ddp_model is a {type(ddp_model).__name__}: expected a DistributedDataParallel model"
        )
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


def check_parameters(ddp_model: DistributedDataParallel, names: Mapping[Tensor, str]) -> None:
    """Raise TypeError where the gradient of a trainable parameter is sparse or not real."""
    sparse = sorted(_sparse_gradients(ddp_model.module) & set(names.values()))
    if sparse:
        raise TypeError(
            f"the gradient of {', '.join(sparse)} is sparse: expected dense gradients, "
            "so make the embedding with sparse=False"
        )
    for parameter, name in names.items():
        if not parameter.is_floating_point():
            raise TypeError(
                f"{name} has dtype {parameter.dtype}: expected a real floating-point parameter"
            )


def check_unused(ddp_model: DistributedDataParallel, scope: str) -> bool:
    """Return whether parameters may go unused; ValueError with a scope that cannot tell them."""
    may_be_unused = bool(ddp_model.find_unused_parameters)
    if may_be_unused and scope == "bucket":
        raise ValueError(
            "scope='bucket' with find_unused_parameters=True: expected 'parameter', since what is "
            "owed for a parameter that no rank uses in a step must wait"
        )
    return may_be_unused


def check_grad_scaler(grad_scaler: GradScaler | None) -> GradScaler | None:
    """Return `grad_scaler`, or raise TypeError unless it is None or a GradScaler."""
    if not isinstance(grad_scaler, GradScaler | None):
        raise TypeError(
            f"grad_scaler is a {type(grad_scaler).__name__}: expected a torch.amp.GradScaler"
        )
    return grad_scaler


def exchanged_names(ddp_model: DistributedDataParallel) -> dict[Tensor, str]:
    """Return the name of each parameter that may be in a bucket: also of those frozen by now.

    DistributedDataParallel goes by what was trainable when it was made.
    """
    return {
        parameter: plain_name(name)
        for name, parameter in ddp_model.module.named_parameters()
        if name not in ddp_model.parameters_to_ignore
    }


def trainable_names(ddp_model: DistributedDataParallel) -> dict[Tensor, str]:
    """Return the name of each parameter whose gradient the hook is to sparsify.

    torch.compile's prefix is left out, so that a state fits the model compiled or not.
    """
    return {p: name for p, name in exchanged_names(ddp_model).items() if p.requires_grad}


def plain_name(name: str) -> str:
    """Return a parameter's name without torch.compile's prefix."""
    return name.replace("_orig_mod.", "")


def _sparse_gradients(module: nn.Module) -> set[str]:
    return {
        plain_name(f"{prefix}.weight" if prefix else "weight")
        for prefix, child in module.named_modules()
        if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.sparse
    }
