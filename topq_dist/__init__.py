"""Top-Q gradient compression for distributed training across slow links."""

from topq_dist._version import __version__
from topq_dist.compress.compressor import Compressor
from topq_dist.compress.frame import FrameError
from topq_dist.ddp.hook import TopQState, register_topq_hook, topq_hook
from topq_dist.ddp.messages import ExchangeError
from topq_dist.optim import (
    GradientTransformerOptimizer,
    ParamTransformingOptimizer,
    TopQGradientOptimizer,
)
from topq_dist.telemetry import Stats

__all__ = [
    "Compressor",
    "ExchangeError",
    "FrameError",
    "GradientTransformerOptimizer",
    "ParamTransformingOptimizer",
    "Stats",
    "TopQGradientOptimizer",
    "TopQState",
    "__version__",
    "register_topq_hook",
    "topq_hook",
]
