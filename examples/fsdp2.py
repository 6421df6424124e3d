"""FSDP2 inside two replicas, top-Q frames between them.

torchrun --nproc-per-node 4 examples/fsdp2.py trains two replicas of two shards on this machine. On
two hosts, with torchrun's --nnodes 2, each has a replica, and only frames go between them.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from topq_dist import register_topq_hook

dist.init_process_group("gloo")
replicas = 2, dist.get_world_size() // 2
mesh = init_device_mesh("cpu", replicas, mesh_dim_names=("replicate", "shard"))
torch.set_num_threads(1)
torch.manual_seed(0)  # the replicas begin alike
layers = torch.nn.Linear(32, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1)
model = torch.nn.Sequential(*layers)
for part in (*model, model):
    fully_shard(part, mesh=mesh["shard"])  # not the whole mesh, whose replicas torch reduces
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
between = mesh.get_group("replicate")
state = register_topq_hook(model, optimizer, replicate_group=between, exchange="allgather")
torch.manual_seed(1 + dist.get_rank())
for step in range(300):
    inputs = torch.randn(16, 32)
    loss = (model(inputs) - inputs[:, :8].sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0 and dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")
if dist.get_rank() == 0:
    print(f"{state.stats().ratio:.0f} times fewer bytes between the replicas")
dist.destroy_process_group()
