"""A plain DistributedDataParallel training script; topq_dist adds the two marked lines.

    torchrun --standalone --nproc-per-node 2 launch/train.py --data digits

Without --dense it trains with top-Q gradients; `launch/train.sh` runs it both ways.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training.data import load_data
from training.ddp_run import DdpRun
from training.errors import leave, one_line_errors
from training.models import OPTIMIZERS, build_model, cross_entropy, set_lr
from training.options import parse_rank
from training.settings import Rank

from topq_dist import register_topq_hook  # <== 1. topq_dist


def main(options: Rank) -> None:
    training = options.training
    torch.manual_seed(training.seed)
    data = load_data(training.data, training.data_dir)
    model = DistributedDataParallel(build_model(data))
    optimizer = OPTIMIZERS[training.inner_opt](model.parameters(), lr=training.lr)

    state = None
    if options.mode == "topq":
        # by default, a link fast enough gets dense gradients: those are the other mode here
        state = register_topq_hook(
            model, optimizer, q=training.q, exchange="allgather"
        )  # <== 2. topq_dist

    run = DdpRun(options, data, model, optimizer, state)
    for step in run.steps():
        inputs, targets = run.batch(step)
        set_lr(optimizer, training, step)
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        run.record(step, loss.detach())
    run.finish()


if __name__ == "__main__":
    options = parse_rank()
    # a rank that waits for a dead one gives up after the timeout
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    with one_line_errors("train.py"):
        main(options)
    dist.destroy_process_group()
    leave()
