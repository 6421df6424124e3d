"""Top-Q gradient compression for distributed training across slow links."""

from importlib import import_module
from typing import TYPE_CHECKING

from topq_dist._version import __version__

if TYPE_CHECKING:
    from topq_dist.advice.advise import advise
    from topq_dist.advice.report import Advice
    from topq_dist.compress.codec.frame import FrameError
    from topq_dist.compress.named_compressor import Compressor
    from topq_dist.ddp.hook import TopQState, topq_hook
    from topq_dist.elastic.errors import RefusedError
    from topq_dist.elastic.settings import Elastic
    from topq_dist.exchange.agreement import ExchangeError
    from topq_dist.local.local_topq import LocalTopQ
    from topq_dist.optim import (
        ChainedParamTransformingOptimizer,
        GradientTransformerOptimizer,
        ParamTransformingOptimizer,
        TopQGradientOptimizer,
        register_momentum_rule,
    )
    from topq_dist.q_policies import QByLoss, QByTensor, QSchedule
    from topq_dist.register import register_topq_hook
    from topq_dist.telemetry import Stats

__all__ = [
    "Advice",
    "ChainedParamTransformingOptimizer",
    "Compressor",
    "Elastic",
    "ExchangeError",
    "FrameError",
    "GradientTransformerOptimizer",
    "LocalTopQ",
    "ParamTransformingOptimizer",
    "QByLoss",
    "QByTensor",
    "QSchedule",
    "RefusedError",
    "Stats",
    "TopQGradientOptimizer",
    "TopQState",
    "__version__",
    "advise",
    "register_momentum_rule",
    "register_topq_hook",
    "topq_hook",
]

# Where each name lives. They come when first asked for (PEP 562): torch takes seconds to import,
# and `topq status` and `topq health` do without it.
_HOMES = {
    "Advice": "advice.report",
    "ChainedParamTransformingOptimizer": "optim",
    "Compressor": "compress.named_compressor",
    "Elastic": "elastic.settings",
    "ExchangeError": "exchange.agreement",
    "FrameError": "compress.codec.frame",
    "GradientTransformerOptimizer": "optim",
    "LocalTopQ": "local.local_topq",
    "ParamTransformingOptimizer": "optim",
    "QByLoss": "q_policies",
    "QByTensor": "q_policies",
    "QSchedule": "q_policies",
    "RefusedError": "elastic.errors",
    "Stats": "telemetry",
    "TopQGradientOptimizer": "optim",
    "TopQState": "ddp.hook",
    "advise": "advice.advise",
    "register_momentum_rule": "optim",
    "register_topq_hook": "register",
    "topq_hook": "ddp.hook",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
