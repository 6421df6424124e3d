"""Lightning's Trainer with top-Q gradients, saved and resumed in its own checkpoints.

python examples/lightning_ddp.py FOLDER trains in two processes on this machine; with a checkpoint
behind FOLDER, such as FOLDER/epoch=1.ckpt, it goes on from there.
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from topq_dist.integrations.lightning import TopQCallback


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = torch.nn.Linear(32, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1)
        self.model = torch.nn.Sequential(*layers)

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


folder, *resume = sys.argv[1:]
seed_everything(0)
inputs = torch.randn(1024, 32)
data = TensorDataset(inputs, inputs[:, :8].sum(1, keepdim=True))
topq = TopQCallback(exchange="allgather")
callbacks = [topq, ModelCheckpoint(folder, "{epoch}", save_top_k=-1)]
ranks = {"accelerator": "cpu", "strategy": "ddp", "devices": 2}
trainer = Trainer(**ranks, max_epochs=4, callbacks=callbacks, logger=False)
trainer.fit(Regression(), DataLoader(data, 16, shuffle=True), ckpt_path=next(iter(resume), None))
if trainer.is_global_zero and topq.state is not None:
    stats = topq.state.stats()
    print(f"{stats.steps} steps with {stats.ratio:.0f} times fewer bytes")
