"""Two sites on a slow link: DistributedDataParallel inside each, LocalTopQ across.

torchrun --nproc-per-node 4 examples/local_two_sites.py trains two sites of two processes on this
machine; started on each of two hosts with torchrun's --nnodes 2 it trains between them.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from topq_dist import LocalTopQ

dist.init_process_group("gloo")
sites = 2, dist.get_world_size() // 2
mesh = init_device_mesh("cpu", sites, mesh_dim_names=("across", "inside"))
torch.set_num_threads(1)
torch.manual_seed(dist.get_rank())
layers = torch.nn.Linear(32, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1)
model = DistributedDataParallel(
    torch.nn.Sequential(*layers), process_group=mesh.get_group("inside")
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.0, 0.999))
steps = LocalTopQ(
    model, optimizer, every=10, q=0.97, overlap=2, process_group=mesh.get_group("across")
)
for step in range(300):
    inputs = torch.randn(16, 32)
    loss = (model(inputs) - inputs[:, :8].sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    steps.step()
    if step % 50 == 0 and dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")
steps.synchronize()
if dist.get_rank() == 0:
    print(f"{steps.stats().ratio:.0f} times fewer bytes than a gradient each step")
dist.destroy_process_group()
