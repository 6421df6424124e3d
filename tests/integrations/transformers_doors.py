"""Run by test_transformers.py on two ranks in that environment: which checkpoint is resumed."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from topq_dist.integrations.transformers import TopQCallback

FOLDER = Path(sys.argv[1])


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layer(rows).square().mean()}


def trainer_in(folder: Path, **knobs: Any) -> tuple[Trainer, TopQCallback]:
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        remove_unused_columns=False,
        **quiet,
    )
    trainer = Trainer(Module(), arguments, train_dataset=[{"rows": torch.ones(64)}] * 64)
    callback = TopQCallback(trainer, exchange="allgather", **knobs)
    trainer.add_callback(callback)
    return trainer, callback


def steps_from(folder: Path, checkpoint: Path, **knobs: Any) -> int:
    trainer, callback = trainer_in(folder, **knobs)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert callback.state is not None
    return callback.state.stats().steps


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (FileNotFoundError, TypeError, ValueError) as error:
        return str(error)
    raise AssertionError("no error")


one, other = FOLDER / "one", FOLDER / "other"
trainer, callback = trainer_in(one)
# not wrapped yet, as in a run of one process
begin = trainer.args, trainer.state, trainer.control
said = error_of(lambda: callback.on_train_begin(*begin))
assert "expected the Trainer to wrap its model in DistributedDataParallel" in said
trainer.train()
assert callback.state is not None
assert callback.state.stats().steps == 4
# the same wrapper, the same hook
trainer.train()
assert callback.state.stats().steps == 8
trainer.accelerator.wait_for_everyone()
first_rank = trainer.is_world_process_zero()
if first_rank:
    # another run's checkpoint of the same step
    shutil.copytree(one / "checkpoint-2", other / "checkpoint-2")
    text = (other / "checkpoint-2" / "trainer_state.json").read_text()
    (other / "checkpoint-2" / "trainer_state.json").write_text(text.replace('"epoch"', '"era"'))
trainer.accelerator.wait_for_everyone()

half = one / "checkpoint-2"
said = error_of(lambda: steps_from(other, half))
assert "is not the checkpoint that training resumes from" in said
# it was saved again in the second training, whose sixth step that was
assert steps_from(FOLDER / "third", half, resume_from=half) == 8
trainer.accelerator.wait_for_everyone()
if first_rank:
    (half / "topq_state.pt").unlink()
trainer.accelerator.wait_for_everyone()
said = error_of(lambda: steps_from(FOLDER / "fourth", half, resume_from=half))
assert "saved without the hook" in said
assert steps_from(FOLDER / "fourth", half, resume_from=False) == 2
print("all doors tried")
