"""A worker of a parameter server that takes ten local steps between its pushes.

    topq serve --address 127.0.0.1:50051 --state-dir run1 --inner-opt sgd --lr 1.0 --workers 2
    python examples/server_local_steps.py 127.0.0.1:50051 a
    python examples/server_local_steps.py 127.0.0.1:50051 b

The server's optimizer, SGD of rate 1, takes the outer steps; each worker's own the inner ones.
"""

import sys

import torch

from topq_dist.ps import ParameterServerOptimizer

address, worker = sys.argv[1:]
torch.set_num_threads(1)
layers = torch.nn.Linear(32, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1)
model = torch.nn.Sequential(*layers)
local = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.0, 0.999))
with ParameterServerOptimizer(
    model.named_parameters(), address, worker=worker, every=10, local_optimizer=local
) as optimizer:
    for step in range(300):
        inputs = torch.randn(16, 32)
        loss = (model(inputs) - inputs[:, :8].sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    print(f"{optimizer.stats().ratio:.0f} times fewer bytes than a gradient a step")
