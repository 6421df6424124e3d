"""torchtitan's Trainer with top-Q frames between its replicas, in its own checkpoints.

torchrun --nproc-per-node 4 .../torchtitan_hsdp.py --module llama3 --config llama3_debugmodel
--parallelism.data_parallel_replicate_degree 2, in a checkout of torchtitan, whose data that reads,
trains two replicas of two shards. The arguments are those of torchtitan's own train.py.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torchtitan.config import ConfigManager
from torchtitan.tools.logging import init_logger

from topq_dist import register_topq_hook


def inside_replicas(parallelize: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def apply(model: nn.Module, *, parallel_dims: Any, **settings: Any) -> nn.Module:
        shards = copy.copy(parallel_dims)
        shards.dp_replicate = 1  # or fully_shard is given the replicas, too, and all-reduces
        return parallelize(model, parallel_dims=shards, **settings)

    return apply


init_logger()
config = ConfigManager().parse_args()
config.parallelism.spmd_backend = "partial_dtensor"  # what is sharded knows no replicas
config.training.disable_cuda_graphs = True  # a graph that is replayed calls no hook
config.model_spec.parallelize_fn = inside_replicas(config.model_spec.parallelize_fn)
trainer = config.build()
(model,), (optimizer,) = trainer.model_parts, trainer.optimizers.optimizers
between = trainer.parallel_dims.get_mesh("dp_replicate").get_group()
state = register_topq_hook(model, optimizer, replicate_group=between, exchange="allgather")
if config.checkpoint.enable:
    trainer.checkpointer.states["topq"] = state
trainer.train()
if dist.get_rank() == 0:
    stats = state.stats()
    print(f"{stats.steps} steps with {stats.ratio:.0f} times fewer bytes")
trainer.close()
dist.destroy_process_group()
