"""The hook under Ray Train's TorchTrainer."""

from __future__ import annotations

from typing import Unpack

from ray import train
from torch import nn
from torch.optim import Optimizer

from topq_dist import register
from topq_dist.ddp.hook import TopQState
from topq_dist.hook.parts import KnobOptions
from topq_dist.integrations.saving import load_state, save_state

__all__ = ["register_topq_hook", "save_state"]


def register_topq_hook(
    model: nn.Module, optimizer: Optimizer, **knobs: Unpack[KnobOptions]
) -> TopQState:
    """Give a prepared model the hook, which goes on from the checkpoint that Ray Train resumes.

    model: what `ray.train.torch.prepare_model` has returned, on two workers or more.
    optimizer, knobs: as of TopQState.

    A collective. Put the state into each checkpoint with `save_state(state, folder)`, on all
    workers, before rank 0 reports the folder: a run that is started anew, on as many workers or
    fewer, then has its residuals back. Raises what `topq_dist.register_topq_hook` raises, and
    FileNotFoundError where the checkpoint was saved without the hook.
    """
    state = register.register_topq_hook(model, optimizer, **knobs)
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            load_state(state, folder)
    return state
