"""The methods of the report by name, and which of them is tried on which task."""

from __future__ import annotations

from typing import Any

from emulated_ranks import Method

STUDIED_Q = (0.9, 0.97, 0.99, 0.999)
STUDIED_BETA = (0.0, 0.5, 0.9)


def _studied(q: float, beta: float) -> str:
    return f"top-Q, q={q:g}, optimizer's momentum {beta:g}"


# of LocalTopQ: inner steps without momentum, for which feedback stands in, and a residual that
# stays; the outer rate makes up for what Adam's division takes off each rank's own noisy steps
_LOCAL: dict[str, Any] = {
    "kind": "local",
    "residual_decay": 1.0,
    "beta": 0.0,
    "outer_lr": 3.0,
}
_DILOCO: dict[str, Any] = {
    "kind": "local",
    "q": 0.0,
    "value_format": "fp32",
    "bound": None,
    "outer_lr": 0.7,
    "outer_momentum": 0.9,
    "nesterov": True,
}
_STREAMED: dict[str, Any] = {"fragments": 2, "overlap": 1}
FORMATS = ("fp32", "fp16", "bf16", "int8", "int4", "int2")
METHODS = {
    method.name: method
    for method in (
        Method(name="dense", kind="dense"),
        Method(name="dense, no momentum", kind="dense", beta=0.0),
        Method(name="fp16 hook", kind="fp16"),
        *(Method(name=f"PowerSGD {rank}", kind="powersgd", rank=rank) for rank in (1, 2, 4, 8)),
        Method(name="top-Q"),
        Method(name="top-Q, q=0.99", q=0.99),
        Method(name="top-Q, q=0.9982", q=0.9982),
        Method(name="top-Q, q=0.9985", q=0.9985),
        Method(name="top-Q, q=0.9", q=0.9),
        *(
            Method(name=f"top-Q, q=0.99, {name}", q=0.99, value_format=name)
            for name in FORMATS
            if name != "int2"
        ),
        Method(
            name="top-Q, q=0.99, fp16, optimizer's momentum",
            q=0.99,
            value_format="fp16",
            momentum="optimizer",
            bound=None,
        ),
        Method(name="top-Q, keep_rate=False", keep_rate=False),
        *(
            Method(name=f"top-Q, q={q:g}, keep_rate=False", q=q, keep_rate=False)
            for q in (0.9, 0.99, 0.9982, 0.9985)
        ),
        Method(name="top-Q, no bound", bound=None),
        Method(name="top-Q, rate as it is", adapt_rate=False),
        Method(name="top-Q, q=0.99, rate as it is", q=0.99, adapt_rate=False),
        Method(name="top-Q, optimizer's momentum", momentum="optimizer"),
        Method(name="top-Q, corrected", momentum="corrected"),
        *(
            Method(name=_studied(q, beta), q=q, beta=beta, momentum="optimizer")
            for q in STUDIED_Q
            for beta in STUDIED_BETA
        ),
        Method(name="top-Q, adam", momentum="adam"),
        Method(name="top-Q, q=0.99, adam", q=0.99, momentum="adam"),
        Method(name="local, H=5", every=5, **_LOCAL),
        Method(name="local, H=2", every=2, **_LOCAL),
        Method(name="local, H=4, ec1", every=4, q=0.986, value_format="ec1", **_LOCAL),
        Method(name="local, H=8, ec1", every=8, q=0.986, value_format="ec1", **_LOCAL),
        Method(name="local, H=5, streamed", every=5, **_LOCAL, **_STREAMED),
        Method(
            name="local with momentum, H=5",
            every=5,
            **{**_LOCAL, "beta": 0.9, "outer_lr": 2.0},
        ),
        *(Method(name=f"DiLoCo, H={every}", every=every, **_DILOCO) for every in (5, 30)),
        # its authors' density, bits, decay and rates
        *(
            Method(name=f"SparseLoCo, H={every}", kind="local", every=every, q=63 / 64, bound=None)
            for every in (1, 5, 15, 30)
        ),
        # momentum correction and factor masking, whole values; no warm-up, whose bytes count
        *(
            Method(name=f"DGC, q={q:g}", q=q, momentum="corrected", value_format="fp32", bound=None)
            for q in (0.99, 0.999)
        ),
    )
}
_MAIN = ["dense", "top-Q"]
_ONE, _RARE = "top-Q, q=0.99", "top-Q, q=0.9982"
_PEERS = ["dense, no momentum", "fp16 hook", "PowerSGD 1", "PowerSGD 4"]
_OURS = ["top-Q, optimizer's momentum", "top-Q, corrected", "top-Q, no bound"]
_FORMATS = [f"top-Q, q=0.99, {name}" for name in FORMATS if name != "int2"]
_AS_IT_IS = ["top-Q, rate as it is", "top-Q, q=0.99, rate as it is"]
_LOCAL_PEERS = ["DiLoCo, H=5", "DiLoCo, H=30", "SparseLoCo, H=30"]
_FRONTIER = [
    *(f"PowerSGD {rank}" for rank in (1, 2, 4, 8)),
    *(f"DGC, q={q:g}" for q in (0.99, 0.999)),
    *(f"SparseLoCo, H={every}" for every in (1, 5, 15)),
]
_OLD = ["top-Q, q=0.99, fp16, optimizer's momentum"]


ALL_SEEDS = (0, 1, 2)


def _rows(
    task: str,
    steps: int,
    methods: list[str],
    *,
    workers: int = 4,
    seeds: tuple[int, ...] = ALL_SEEDS,
) -> dict[str, Any]:
    return {
        "task": task,
        "steps": steps,
        "workers": workers,
        "methods": methods,
        "seeds": seeds,
    }


def _long(*seeds: int) -> list[dict[str, Any]]:
    return [
        _rows("cifar10-sgd", 4500, [*_MAIN, _RARE, "top-Q, q=0.9985"], seeds=seeds),
        _rows("gpt-moby", 3000, [*_MAIN, _ONE], seeds=seeds),
        _rows("gpt-shakespeare", 3000, [*_MAIN, _ONE], seeds=seeds),
        _rows("cifar10-adamw", 4500, [*_MAIN, _RARE], seeds=seeds),
    ]


_STUDY = [_studied(q, beta) for q in STUDIED_Q for beta in STUDIED_BETA]
# in the order in which they are worth having
PLAN: list[dict[str, Any]] = [
    _rows("cifar10-sgd", 1500, [*_MAIN, _RARE]),
    _rows("gpt-moby", 1000, [*_MAIN, _ONE]),
    _rows("tied-cycles", 200, [*_MAIN, _ONE, *_AS_IT_IS, "top-Q, adam", "top-Q, q=0.99, adam"]),
    _rows("tied-onecycle", 200, [*_MAIN, _ONE, *_AS_IT_IS, "top-Q, adam"]),
    _rows("gpt-moby", 1000, _MAIN, workers=2),
    _rows("gpt-shakespeare", 1000, [*_MAIN, _ONE]),
    _rows("cifar10-adamw", 1500, [*_MAIN, _RARE]),
    _rows("gpt-shakespeare", 1000, _MAIN, workers=2),
    _rows("cifar10-sgd", 4500, [*_MAIN, _RARE, "top-Q, q=0.9985"], seeds=(0,)),
    _rows("gpt-moby", 3000, [*_MAIN, _ONE], seeds=(0,)),
    _rows("gpt-moby", 1000, _FORMATS, seeds=(0,)),
    _rows("lstm-moby", 1000, _MAIN, seeds=(0,)),
    _rows("recommender", 1000, _MAIN, seeds=(0,)),
    _rows("gpt-moby", 1000, _STUDY, workers=2, seeds=(0,)),
    _rows("cifar10-sgd", 1500, [*_PEERS, *_OURS, *_OLD], seeds=(0,)),
    _rows("cifar10-sgd", 1500, _STUDY, workers=2, seeds=(0,)),
    _rows("gpt-moby", 1000, [*_PEERS, *_OURS, "top-Q, adam", *_OLD], seeds=(0,)),
    _rows("gpt-shakespeare", 3000, [*_MAIN, _ONE], seeds=(0,)),
    _rows("cifar10-adamw", 4500, [*_MAIN, _RARE], seeds=(0,)),
    _rows("digits-sgd", 500, _MAIN),
    _rows("lstm-moby", 1000, _MAIN, seeds=(1, 2)),
    _rows("recommender", 1000, _MAIN, seeds=(1, 2)),
    _rows("fashion-sgd", 1500, _MAIN),
    _rows("gpt-moby", 1000, ["local, H=5", "local, H=2", "local, H=5, streamed", *_LOCAL_PEERS]),
    _rows("gpt-moby", 3000, ["local, H=5", "local, H=2", *_LOCAL_PEERS]),
    _rows("cifar10-sgd", 4500, ["local with momentum, H=5", *_LOCAL_PEERS]),
    _rows("gpt-moby", 1000, ["local, H=4, ec1"]),
    _rows("gpt-moby", 3000, ["local, H=4, ec1"]),
    _rows("cifar10-sgd", 1500, ["top-Q, q=0.99", "top-Q, q=0.9985"]),
    _rows("cifar10-adamw", 1500, ["top-Q, q=0.9985"]),
    _rows("gpt-moby", 1000, [*_FRONTIER, "local, H=8, ec1", "top-Q, q=0.9"], seeds=(0,)),
    _rows("cifar10-sgd", 1500, _FRONTIER, seeds=(0,)),
    *_long(1),
    *_long(2),
]
