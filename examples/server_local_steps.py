"""A parameter server, and workers that take local steps between their pushes.

    python examples/server_local_steps.py

starts a server and two workers on this machine; on several, the command below runs on one of them
and `train` on the others.
"""

import multiprocessing
import subprocess
import sys
import tempfile

import torch

from topq_dist.ps import ParameterServerOptimizer

WORKERS, STEPS = 2, 300
SERVE = ["serve", "--inner-opt", "sgd", "--lr", "1.0", "--workers", str(WORKERS)]


def train(worker: str, address: str) -> None:
    torch.set_num_threads(1)
    layers = torch.nn.Linear(32, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1)
    model = torch.nn.Sequential(*layers)
    local = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.0, 0.999))
    with ParameterServerOptimizer(
        model.named_parameters(), address, worker=worker, every=10, local_optimizer=local
    ) as optimizer:
        for step in range(STEPS):
            inputs = torch.randn(16, 32)
            loss = (model(inputs) - inputs[:, :8].sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                print(f"{worker}, step {step}: loss {loss.item():.4f}", flush=True)
        print(f"{worker}: {optimizer.stats().ratio:.0f} times fewer bytes than a gradient a step")


def main() -> None:
    topq = [sys.executable, "-m", "topq_dist.cli", *SERVE, "--address", "127.0.0.1:0"]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen([*topq, "--state-dir", folder], stdout=subprocess.PIPE, text=True)
        # listening on HOST:PORT
        address = next(iter(server.stdout or ())).split()[-1]
        start = multiprocessing.get_context("spawn").Process
        workers = [start(target=train, args=(f"w{n}", address)) for n in range(WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        server.terminate()
        server.wait()
    sys.exit(any(worker.exitcode for worker in workers))


if __name__ == "__main__":
    main()
