"""The hook under the Trainer of Hugging Face Transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, Unpack

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from topq_dist.ddp.hook import TopQState
from topq_dist.hook.parts import KnobOptions
from topq_dist.integrations.saving import load_state, save_state
from topq_dist.module_names import unwrapped
from topq_dist.register import register_topq_hook

_TRAINER_STATE = "trainer_state.json"


class TopQCallback(TrainerCallback):
    """Gives the Trainer's model the hook as training begins, and keeps its state in checkpoints.

    trainer: the one it is added to, `trainer.add_callback(TopQCallback(trainer))`, since callbacks
        are not shown the wrapped model.
    resume_from: the checkpoint folder that `train(resume_from_checkpoint=...)` is given, which
        callbacks are not told either. Only where it is not `checkpoint-STEP` in `output_dir`. False
        for one that was saved without the hook, whose residuals begin at zero.
    knobs: those of TopQState; grad_scaler is the Trainer's own unless it is given.

    `train` raises TypeError unless the model is in DistributedDataParallel, what
    `topq_dist.register_topq_hook` raises, and, for a checkpoint that has no state of the hook or is
    not the one resumed, FileNotFoundError or ValueError.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        resume_from: str | os.PathLike[str] | Literal[False] | None = None,
        **knobs: Unpack[KnobOptions],
    ) -> None:
        self._trainer = trainer
        self._resume_from = resume_from
        self._knobs = knobs
        self._model: nn.Module | None = None
        # of the training that has begun last
        self.state: TopQState | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Register the hook, now that Accelerate has wrapped the model, and resume."""
        model, optimizer = self._trainer.model_wrapped, self._trainer.optimizer
        if not isinstance(unwrapped(model), DistributedDataParallel):
            raise TypeError(
                f"TopQCallback with a {type(model).__name__}: expected the Trainer to wrap its "
                "model in DistributedDataParallel, as it does in several processes (torchrun)"
            )
        # a second train() goes on with the same wrapper
        if self.state is None or self._model is not model or self.state.optimizer is not optimizer:
            knobs = self._knobs.copy()
            if self._trainer.accelerator.scaler is not None:
                knobs.setdefault("grad_scaler", self._trainer.accelerator.scaler)
            self.state = register_topq_hook(model, optimizer, **knobs)
            self._model = model
        if state.global_step > 0 and self._resume_from is not False:
            load_state(self.state, self._resumed_folder(args, state))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the states of all ranks to the checkpoint that was just written."""
        if self.state is not None and not args.save_only_model:
            save_state(self.state, _usual_folder(args, state))

    def _resumed_folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        if isinstance(self._resume_from, str | os.PathLike):
            folder = Path(self._resume_from)
        else:
            folder = _usual_folder(args, state)
        path = folder / _TRAINER_STATE
        history = json.loads(path.read_text())["log_history"] if path.is_file() else None
        # as text, since a loss may be NaN
        if history is None or json.dumps(history) != json.dumps(state.log_history):
            raise ValueError(
                f"{folder} is not the checkpoint that training resumes from: expected its folder "
                "as resume_from= of TopQCallback"
            )
        return folder


def _usual_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
