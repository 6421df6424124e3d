"""The hook under Lightning's Trainer."""

from __future__ import annotations

from typing import Any, Unpack

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel

from topq_dist.ddp.hook import TopQState, topq_hook
from topq_dist.hook.parts import KnobOptions
from topq_dist.register import register_topq_hook


class TopQCallback(Callback):
    """Gives the model of a fit the hook, and keeps its state in the Trainer's checkpoints.

    state: one that the strategy has been handed, `TopQState(module, ...)` for
        `DDPStrategy(ddp_comm_state=state, ddp_comm_hook=topq_hook)`: Lightning registers it on GPUs
        alone, and this elsewhere; its optimizer is set here. None: each fit makes one.
    knobs: those of TopQState, without a state; grad_scaler is the Trainer's own unless it is given.

    It wants a strategy on DistributedDataParallel and one optimizer: else `fit` raises TypeError or
    ValueError, or what `topq_dist.register_topq_hook` raises. Checkpoints are to be saved on all
    ranks at once, as ModelCheckpoint and `trainer.save_checkpoint` do; any number of ranks resume.
    """

    def __init__(self, state: TopQState | None = None, **knobs: Unpack[KnobOptions]) -> None:
        if state is not None and knobs:
            raise ValueError(
                f"state and {', '.join(knobs)}: expected either a state or the knobs of one"
            )
        self._handed_over = state
        self._knobs = knobs
        self._loaded: dict[str, Any] | None = None
        # of the fit that has begun last
        self.state: TopQState | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the fit before, whose state a checkpoint that is loaded next is not for."""
        if stage == "fit":
            self.state = self._loaded = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hook, now that the strategy has wrapped the model."""
        model = trainer.strategy.model
        if not isinstance(model, DistributedDataParallel):
            raise TypeError(
                f"TopQCallback with {type(trainer.strategy).__name__}: expected a strategy on "
                "DistributedDataParallel, such as strategy='ddp'"
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"TopQCallback with {len(trainer.optimizers)} optimizers: expected one, which "
                "steps the model"
            )
        (optimizer,) = trainer.optimizers
        state = self._handed_over
        if state is None:
            knobs = self._knobs.copy()
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None:
                knobs.setdefault("grad_scaler", scaler)
            state = register_topq_hook(model, optimizer, **knobs)
        else:
            # private, and read leniently: torch says no to a second hook
            if not getattr(model, "_comm_hooks", None):
                model.register_comm_hook(state, topq_hook)
            state.optimizer = optimizer
        self.state = state
        if self._loaded is not None:
            self.load_state_dict(self._loaded)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all ranks on rank 0, which writes the checkpoint; a collective."""
        return {} if self.state is None else self.state.state_dict(all_ranks=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint's, at once or as soon as the hook is registered."""
        if self.state is None:
            self._loaded = state_dict
        else:
            self.state.load_state_dict(state_dict)
            self._loaded = None
