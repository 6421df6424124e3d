"""A plain training script on a parameter server; topq_dist adds the two marked lines.

    topq serve --address 127.0.0.1:50051 --state-dir state --workers 2 --inner-opt sgd --lr 0.1 &
    python launch/ps_worker.py --server 127.0.0.1:50051 --rank 0 --ranks 2 &
    python launch/ps_worker.py --server 127.0.0.1:50051 --rank 1 --ranks 2

Workers need neither torchrun nor a process group: each is a process, or a container, of its own.
`launch/train.sh --mode ps` runs all of them.
"""

from __future__ import annotations

import torch
from training.data import load_data
from training.models import build_model, cross_entropy, set_lr
from training.options import parse_worker
from training.ps_run import PsRun, client_security, end_when_told, one_line_worker_errors
from training.settings import Worker

from topq_dist.ps import ParameterServerOptimizer  # <== 1. topq_dist


def main(options: Worker) -> None:
    training = options.training
    torch.manual_seed(training.seed)
    data = load_data(training.data, training.data_dir)
    model = build_model(data)
    security = client_security(options.connection, options.name)
    optimizer = ParameterServerOptimizer(  # <== 2. topq_dist, in place of torch.optim
        model.named_parameters(),
        options.connection.servers,
        q=training.q,
        worker=options.name,
        tls=security.tls,
        token=security.token,
    )

    run = PsRun(options, data, model, optimizer)
    for step in run.steps():
        inputs, targets = run.batch(step)
        set_lr(optimizer, training, step)
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.report(loss=loss)
        optimizer.step()
        run.record(step, loss.detach())
    run.finish()


if __name__ == "__main__":
    end_when_told()
    options = parse_worker()
    with one_line_worker_errors("ps_worker.py", options.name):
        main(options)
