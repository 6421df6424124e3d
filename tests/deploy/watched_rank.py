"""A rank that serves its metrics and trains on, `watched_rank.py STORE`, for test_monitoring.

It says where it serves them. With each line on stdin it goes through as many steps as that says:
"well 100", or, with a void one in 50 and next to nothing sent, "badly 700".
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import register_topq_hook
from topq_dist.telemetry import serve_metrics

VOID_EVERY = 50


def main(store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 1), rank=0, world_size=1)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(40, 40))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    state = register_topq_hook(model, optimizer, exchange="allgather", q=0.8)
    server = serve_metrics(state)
    print("{}:{}".format(*server.address), flush=True)
    for line in sys.stdin:
        how, _, steps = line.partition(" ")
        state.q = 0.8 if how == "well" else 0.9999
        for step in range(int(steps)):
            loss = model(torch.randn(8, 40)).square().mean()
            if how == "badly" and step % VOID_EVERY == 0:
                loss = loss * float("inf")
            optimizer.zero_grad()
            loss.backward()
            if torch.isfinite(loss):
                optimizer.step()
        print("done", flush=True)
    server.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
