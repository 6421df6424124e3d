"""The shards of a parameter server, and its workers, started by Ray on whatever nodes it has.

    python examples/ray_server.py

starts a Ray of this machine; with RAY_ADDRESS set it takes that cluster, on whose network the
servers speak in the clear, as Ray itself does.
"""

import subprocess
import sys
import tempfile

import ray
import torch

from topq_dist.ps import ParameterServerOptimizer

SHARDS, WORKERS = 2, 2
SERVE = ["serve", "--inner-opt", "sgd", "--lr", "0.05", "--workers", str(WORKERS), "--insecure"]


class Server:
    """A shard: `topq serve` on the node that Ray has found for it."""

    def __init__(self) -> None:
        where = ["--address", f"{ray.util.get_node_ip_address()}:0"]
        state = ["--state-dir", tempfile.mkdtemp()]  # on a cluster: where it outlives the node
        topq = [sys.executable, "-m", "topq_dist.cli", *SERVE, *where, *state]
        self.process = subprocess.Popen(topq, stdout=subprocess.PIPE, text=True)

    def address(self) -> str:
        return next(iter(self.process.stdout or ())).split()[-1]  # listening on HOST:PORT

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait()


def train(worker: str, servers: list[str]) -> str:
    torch.set_num_threads(1)
    layers = torch.nn.Linear(32, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1)
    model = torch.nn.Sequential(*layers)
    with ParameterServerOptimizer(model.named_parameters(), servers, worker=worker) as optimizer:
        losses = []
        for _ in range(400):
            inputs = torch.randn(16, 32)
            loss = (model(inputs) - inputs[:, :8].sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ratio = optimizer.stats().ratio
    first, last = losses[0], sum(losses[-20:]) / 20
    return f"{worker}: loss {first:.4f}, then {last:.4f}, {ratio:.0f} times fewer bytes up"


ray.init()
shards = [ray.remote(Server).remote() for _ in range(SHARDS)]
servers = ray.get([shard.address.remote() for shard in shards])
print(f"servers at {', '.join(servers)}")
for line in ray.get([ray.remote(train).remote(f"w{n}", servers) for n in range(WORKERS)]):
    print(line)
sys.exit(any(ray.get([shard.stop.remote() for shard in shards])))
