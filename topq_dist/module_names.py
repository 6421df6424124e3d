"""A model and its parameters' names, without what torch.compile puts around them."""

from __future__ import annotations

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model within what torch.compile has made of it."""
    while isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod  # type: ignore[assignment]
    return model


def plain_name(name: str) -> str:
    """Return a parameter's name without torch.compile's prefix."""
    return name.replace("_orig_mod.", "")
