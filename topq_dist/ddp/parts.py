"""A hook's parts, made of a model in DistributedDataParallel or one that is wrapped later."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from topq_dist.compress.planned_segments import widest_format
from topq_dist.ddp.bucket_layouts import BucketLayouts
from topq_dist.ddp.model_checks import check_parameters, exchanged_names
from topq_dist.ddp.model_facts import ModelFacts
from topq_dist.exchange.registry import check_exchange
from topq_dist.hook.parts import HookParts, Knobs, WrappedModel, assemble
from topq_dist.hook.sparsity_policy import make_sparsity_policy


def make_parts(knobs: Knobs, model: nn.Module, optimizer: Optimizer | None) -> HookParts:
    """Return a hook's parts for a model; raises TypeError or ValueError, having touched nothing."""
    ddp_model = model if isinstance(model, DistributedDataParallel) else None
    names = exchanged_names(model)
    trainable = {parameter: name for parameter, name in names.items() if parameter.requires_grad}
    check_parameters(model if ddp_model is None else ddp_model.module, trainable)
    per_node = check_exchange(knobs.exchange, knobs.ranks_per_node)
    half = frozenset(name for one, name in names.items() if one.dtype == torch.float16)
    value_format = knobs.value_format
    if value_format is None and half and knobs.grad_scaler is not None:
        # unscaled they travel as fp32, which a budget must know
        value_format = widest_format([torch.float32, *(one.dtype for one in names)])
    sparsity = make_sparsity_policy(
        names, optimizer, q=knobs.q, scope=knobs.scope, value_format=value_format
    )
    wrapped = WrappedModel(
        names,
        ModelFacts(ddp_model, names, knobs.scope),
        sparsity,
        BucketLayouts(names, sparsity),
        half,
    )
    return assemble(knobs, wrapped, optimizer, per_node)
