"""Processes for tests that start in a fraction of a second, since torch is imported once for all.

They are forked from a process that has imported torch, and neither grpc nor anything with threads.
"""

from __future__ import annotations

import multiprocessing

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "pytest",
        "topq_dist.ddp",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "topq_dist.optim",
        "topq_dist.ps.state.run_state",
        "topq_dist.ps.state.snapshotter",
        "torch._dynamo",  # which an optimizer imports when it is made, and DDP as well
        "torch.distributed.nn",
        "torch.nn.parallel",
        # for the runs of launch/, where they are installed
        "sklearn.datasets",
        "sklearn.model_selection",
        "matplotlib.figure",
    ]
)
