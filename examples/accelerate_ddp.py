"""Accelerate with top-Q gradients, saved by its save_state and resumed by its load_state.

torchrun --nproc-per-node 2 examples/accelerate_ddp.py FOLDER trains in two processes on this
machine; with a number behind FOLDER it goes on from the end of that epoch.
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, TensorDataset

from topq_dist.integrations.accelerate import register_topq_hook

folder, first = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
set_seed(0)
# so that the order of an epoch goes by its number, after a resume too
loading = DataLoaderConfiguration(use_seedable_sampler=True)
accelerator = Accelerator(cpu=True, dataloader_config=loading)
inputs = torch.randn(1024, 32)
data = TensorDataset(inputs, inputs[:, :8].sum(1, keepdim=True))
layers = torch.nn.Linear(32, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1)
plain = torch.nn.Sequential(*layers)
adamw = torch.optim.AdamW(plain.parameters(), lr=3e-3)
model, optimizer, batches = accelerator.prepare(plain, adamw, DataLoader(data, 16, shuffle=True))
state = register_topq_hook(accelerator, model, optimizer, exchange="allgather")
if first:
    accelerator.load_state(f"{folder}/epoch{first}")
for epoch in range(first, 4):
    batches.set_epoch(epoch)
    for rows, targets in batches:
        loss = torch.nn.functional.mse_loss(model(rows), targets)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
    accelerator.save_state(f"{folder}/epoch{epoch + 1}")
stats = state.stats()
accelerator.print(f"{stats.steps} steps with {stats.ratio:.0f} times fewer bytes")
accelerator.end_training()
