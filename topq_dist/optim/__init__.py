"""Optimizers that transform gradients and parameters around the step of another optimizer.

- ParamTransformingOptimizer wraps the inner optimizer, reshapes every parameter by param_ndim,
  calls the two transforms that a subclass writes, before and after the inner step, and multiplies
  each gradient by grad_scale and adds grad_bias after the first of them;
- ChainedParamTransformingOptimizer does so with the transforms of several;
- TopQGradientOptimizer is the first with the transform that keeps the top-Q part.

And, for any torch optimizer, what takes its momentum out while gradients are sparse.

Source of the behaviour: rai_toolbox.optim. The departures are listed in each class.
"""

from topq_dist.optim.chained import ChainedParamTransformingOptimizer
from topq_dist.optim.gradient_transforming import (
    GradientTransformerOptimizer,
    TopQGradientOptimizer,
)
from topq_dist.optim.momentum_rules import MomentumRule, MomentumSwitch, register_momentum_rule
from topq_dist.optim.param_transforming import ParamTransformingOptimizer

__all__ = [
    "ChainedParamTransformingOptimizer",
    "GradientTransformerOptimizer",
    "MomentumRule",
    "MomentumSwitch",
    "ParamTransformingOptimizer",
    "TopQGradientOptimizer",
    "register_momentum_rule",
]
