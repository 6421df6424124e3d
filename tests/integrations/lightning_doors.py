"""Run by test_lightning.py in Lightning's environment: a state handed over, and what is refused."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from topq_dist import TopQState, topq_hook
from topq_dist.integrations.lightning import TopQCallback

FOLDER = sys.argv[1]


class Module(LightningModule):
    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)
        self.optimizers_wanted = optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        makes = range(self.optimizers_wanted)
        return [torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9) for _ in makes]


def fit(
    module: Module, callback: TopQCallback | None, strategy: Any = "ddp", **said: Any
) -> Trainer:
    callbacks = [] if callback is None else [callback]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        callbacks=callbacks,
        max_steps=8,
        default_root_dir=FOLDER,
        **quiet,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(64, 64)), 4), **said)
    return trainer


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (TypeError, ValueError) as error:
        return str(error)
    raise AssertionError("no error")


def handed_over(module: Module) -> tuple[TopQState, DDPStrategy]:
    state = TopQState(module, exchange="allgather")
    return state, DDPStrategy(ddp_comm_state=state, ddp_comm_hook=topq_hook)


# by Lightning's own option alone the hook is left out on a CPU; who has set the optimizer is told
module = Module()
state, strategy = handed_over(module)
(optimizer,) = module.configure_optimizers()
state.optimizer = optimizer
module.configure_optimizers = lambda: [optimizer]  # type: ignore[method-assign]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fit(module, None, strategy)
assert state.stats().steps == 0
assert sum("the hook was not called" in str(one.message) for one in caught) == 1

# with the callback it is registered, and has the optimizer of this fit
module = Module()
state, strategy = handed_over(module)
callback = TopQCallback(state)
trainer = fit(module, callback, strategy)
assert callback.state is state
assert state.stats().steps == 8
assert state.optimizer is trainer.optimizers[0]

# a second fit has a hook of its own, and a checkpoint is for that of the fit which loads it
callback = TopQCallback(exchange="allgather")
trainer = fit(Module(), callback)
first = callback.state
trainer.save_checkpoint(f"{FOLDER}/eight.ckpt")
trainer = fit(Module(), callback, ckpt_path=f"{FOLDER}/eight.ckpt")
assert callback.state is not None
assert callback.state is not first
assert callback.state.stats().steps == 8

said = error_of(lambda: fit(Module(), TopQCallback(), strategy="auto"))
assert "expected a strategy on DistributedDataParallel" in said
said = error_of(lambda: fit(Module(optimizers=2), TopQCallback()))
assert "2 optimizers: expected one" in said
said = error_of(lambda: TopQCallback(state, q=0.9))
assert "state and q: expected either" in said
print("all doors tried")
