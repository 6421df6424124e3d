"""A model and its parameters' names, without what torch puts around them."""

from __future__ import annotations

import sys

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model within what torch.compile has made of it."""
    while isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod  # type: ignore[assignment]
    return model


def plain_name(name: str) -> str:
    """Return a parameter's name without torch.compile's prefix."""
    return name.replace("_orig_mod.", "")


def bare_name(name: str) -> str:
    """Return a parameter's name without what torch.compile and checkpoint_wrapper put into it."""
    return plain_name(name).replace("_checkpoint_wrapped_module.", "")


def check_not_fsdp1(model: nn.Module) -> None:
    """Raise TypeError where a model, or a module within it, is in FullyShardedDataParallel."""
    # nobody has one who has not imported it
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FullyShardedDataParallel", ())
    if any(isinstance(module, kind) for module in model.modules()):
        raise TypeError(
            "model is a FullyShardedDataParallel, or has one in it: expected fully_shard (FSDP2) "
            "in its place"
        )
