"""The hook under Hugging Face Accelerate."""

from __future__ import annotations

import weakref
from typing import Any, Unpack

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from topq_dist import register
from topq_dist.ddp.hook import TopQState
from topq_dist.hook.parts import KnobOptions
from topq_dist.integrations.saving import STATE_FILE, load_state, save_state

# how many hooks an accelerator saves, since each has a file of its own
_registered: weakref.WeakKeyDictionary[Accelerator, int] = weakref.WeakKeyDictionary()


def register_topq_hook(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, **knobs: Unpack[KnobOptions]
) -> TopQState:
    """Give a prepared model the hook, whose state `save_state` and `load_state` then keep.

    model, optimizer: what `accelerator.prepare` has returned, in a run of several processes.
    knobs: those of TopQState; grad_scaler is the accelerator's own unless it is given.

    A collective. Raises what `topq_dist.register_topq_hook` raises; `accelerator.load_state` raises
    FileNotFoundError for a checkpoint that was saved without the hook: load it, then register.
    """
    if accelerator.scaler is not None:
        knobs.setdefault("grad_scaler", accelerator.scaler)
    state = register.register_topq_hook(model, optimizer, **knobs)
    number = _registered.get(accelerator, 0)
    _registered[accelerator] = number + 1
    file_name = STATE_FILE if number == 0 else f"{number}_{STATE_FILE}"

    def save(models: Any, weights: Any, folder: str) -> None:
        save_state(state, folder, file_name=file_name)

    def load(models: Any, folder: str) -> None:
        load_state(state, folder, file_name=file_name)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return state
