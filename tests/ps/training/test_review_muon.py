"""Muon on the server: what its momentum has gathered while it was out is not applied later."""

from __future__ import annotations

import pytest
import torch
from ps.training.test_central import Shapes, push_of, random_gradients, random_model

from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.training.central import CentralModel

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon"),
]
MATRIX: Shapes = (("a.weight", (9, 7), torch.float32),)


def test_dense_steps_after_sparse_ones_begin_with_their_own_gradient() -> None:
    model = random_model(MATRIX)
    config = TrainingConfig(inner_opt="muon", options={"momentum": 0.9, "nesterov": False})
    central = CentralModel(config, model.spec, model)
    generator = torch.Generator().manual_seed(1)
    central.apply([push_of(model, random_gradients(model, generator), q=0.9)])
    (gradient,) = random_gradients(model, generator)
    central.apply([push_of(model, [gradient], q=0.0)])
    (buffer,) = (t for key, t in central.state()[0].items() if "momentum_buffer" in key)
    torch.testing.assert_close(buffer, (gradient * (1 - 0.9)).view(9, 7))
