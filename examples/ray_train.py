"""Ray Train with top-Q gradients, in its own checkpoints; a worker that fails costs no residual.

python examples/ray_train.py FOLDER trains on two workers of this machine; with a number behind
FOLDER they fail in that epoch, and Ray starts both anew from the last checkpoint.
"""

import sys
import tempfile
from pathlib import Path

import torch
from ray import train
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from torch.utils.data import DataLoader, TensorDataset

from topq_dist import Stats
from topq_dist.integrations.ray import register_topq_hook, save_state


def train_on_worker(config: dict[str, int]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(1024, 32)
    data = TensorDataset(inputs, inputs[:, :8].sum(1, keepdim=True))
    batches = prepare_data_loader(DataLoader(data, 16, shuffle=True))
    layers = torch.nn.Linear(32, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1)
    model = prepare_model(torch.nn.Sequential(*layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    state = register_topq_hook(model, optimizer, exchange="allgather")
    first, checkpoint = 0, train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder) / "training.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
    for epoch in range(first, 4):
        batches.sampler.set_epoch(epoch)
        for rows, targets in batches:
            loss = (model(rows) - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if checkpoint is None and epoch + 1 == config["fails_in"]:
            raise RuntimeError("a worker fails")
        with tempfile.TemporaryDirectory() as folder:
            save_state(state, folder)
            whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**whole, "epoch": epoch + 1}, Path(folder) / "training.pt")
            is_first = train.get_context().get_world_rank() == 0
            made = train.Checkpoint.from_directory(folder) if is_first else None
            train.report(vars(state.stats()), checkpoint=made)


if __name__ == "__main__":
    config = {"fails_in": int(sys.argv[2]) if len(sys.argv) > 2 else 0}
    failures = train.FailureConfig(max_failures=1)
    storage = str(Path(sys.argv[1]).resolve())
    run = train.RunConfig(name="topq", storage_path=storage, failure_config=failures)
    two = train.ScalingConfig(num_workers=2)
    trainer = TorchTrainer(
        train_on_worker, train_loop_config=config, scaling_config=two, run_config=run
    )
    stats = Stats(**(trainer.fit().metrics or {}))
    print(f"{stats.steps} steps with {stats.ratio:.0f} times fewer bytes")
