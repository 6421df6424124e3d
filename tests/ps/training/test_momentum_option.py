"""Whether a run takes its momentum out: as its options and its snapshot say, and as its log tells.

data/before_momentum.safetensors was saved by the last version that knew nothing of it: `SINGLE` of
test_central.py, SGD with momentum .9, after three sparse pushes.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.servers import Options, serving
from ps.training.momentum_cases import SPARSE, central_of, connect, gradients_of, pushes_at
from ps.training.test_central import SINGLE, random_model, spec_of
from ps.workers import make_model

from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.protocol.config import ConfigError, GroupRule, ServingConfig, TrainingConfig
from topq_dist.ps.server.coordinator import Coordinator
from topq_dist.ps.state.run_state import RunState
from topq_dist.ps.state.snapshot_file import StateError
from topq_dist.ps.state.state_dir import StateDir
from topq_dist.ps.training.inner_step import describe_momentum

pytestmark = pytest.mark.usefixtures("one_thread")

OLD_SNAPSHOT = Path(__file__).parents[1] / "data" / "before_momentum.safetensors"
OLD_SHA256 = "8951b138c396435f89c295168a55dbeaf866c235978f5a721fc758d992eff68b"

OF_BEFORE: Options = {"inner_opt": "sgd", "options": {"lr": 0.1, "momentum": 0.9}}


class TestSnapshots:
    @staticmethod
    def old_folder(tmp_path: Path) -> Path:
        shutil.copy(OLD_SNAPSHOT, tmp_path / "snapshot.safetensors")
        return tmp_path

    def test_of_before_adapt_no_rate_and_say_so(self, tmp_path: Path) -> None:
        training = TrainingConfig(**OF_BEFORE, adapt_rate=True)
        expected = "adapt_rate=True: no effect with momentum='optimizer'"
        with (
            StateDir(self.old_folder(tmp_path)) as folder,
            pytest.raises(ConfigError, match=expected),
        ):
            RunState.load(folder, training, history_bytes=0)

    @pytest.mark.parametrize("momentum", [None, "optimizer"])
    def test_of_before_go_on_as_they_were(self, tmp_path: Path, momentum: Any) -> None:
        training = TrainingConfig(**OF_BEFORE, momentum=momentum)
        with StateDir(self.old_folder(tmp_path)) as folder:
            loaded = RunState.load(folder, training, history_bytes=0)
            assert loaded is not None
            state, _ = loaded
            assert state.sha256() == OLD_SHA256
            assert state.training.momentum == "optimizer"
            tensors, _ = state.central.state()
            model = FlatModel(spec_of(SINGLE))
            model.flats[0].copy_(tensors["model.0"])
            named = model.tensors()
            alone: Any = torch.optim.SGD(list(named.values()), lr=0.1, momentum=0.9, fused=True)
            for place, tensor in enumerate(named.values()):
                alone.state[tensor]["momentum_buffer"] = tensors[f"inner.{place}.momentum_buffer"]
            generator = torch.Generator().manual_seed(11)
            for sequence in (4, 5, 6):
                (push,) = pushes_at(model, generator, SPARSE)
                for name, tensor in gradients_of(push, model).items():
                    named[name].grad = tensor
                state.apply([dataclasses.replace(push, sequence=sequence, digest=bytes(32))])
                alone.step()
            assert state.central.central_raw() == model.raw()
            folder.save(state.snapshot(["w"]))
            again = RunState.load(folder, TrainingConfig(**OF_BEFORE), history_bytes=0)
            assert again is not None
            assert again[0].sha256() == state.sha256()

    def test_that_disagree_are_refused_with_the_remedy(self, tmp_path: Path) -> None:
        training = TrainingConfig(**OF_BEFORE, momentum="feedback")
        with (
            StateDir(self.old_folder(tmp_path)) as folder,
            pytest.raises(StateError, match="momentum is 'feedback', and 'optimizer' in the snaps"),
        ):
            RunState.load(folder, training, history_bytes=0)

    def test_of_a_new_run_say_feedback(self, tmp_path: Path) -> None:
        with serving(tmp_path, OF_BEFORE) as server, connect(make_model(), server.address):
            assert server.coordinator.training.momentum == "feedback"
        with serving(tmp_path, {**OF_BEFORE, "momentum": "feedback"}):
            pass
        with (
            pytest.raises(StateError, match="momentum is 'optimizer', and 'feedback' in the snaps"),
            serving(tmp_path, {**OF_BEFORE, "momentum": "optimizer"}),
        ):
            pass


WHILE_SPARSE = "feedback: while pushes hold less than 50% of the elements"
RULES = (GroupRule(pattern="*.bias", options={"momentum": 0.5}),)


class TestWhatIsSaid:
    @pytest.mark.parametrize(
        ("training", "text", "warns"),
        [
            (
                {"inner_opt": "sgd", "options": {"lr": 0.1, "momentum": 0.9}},
                f"{WHILE_SPARSE}, SGD steps with momentum=0 for 0.9, lr=1 for 0.1",
                False,
            ),
            (
                {"inner_opt": "sgd", "options": {"lr": 0.1}, "groups": RULES},
                f"{WHILE_SPARSE}, SGD steps with '*.bias': momentum=0 for 0.5, lr=0.2 for 0.1",
                False,
            ),
            (
                {"inner_opt": "adamw"},
                (
                    f"{WHILE_SPARSE}, AdamW steps with betas=(0, 0.999) for (0.9, 0.999), at a rate"
                    " that is raised where gradients agree over steps"
                ),
                False,
            ),
            (
                {"inner_opt": "sgd"},
                f"{WHILE_SPARSE}, SGD steps with momentum from workers taken out",
                False,
            ),
            ({"inner_opt": "adagrad"}, "feedback: Adagrad has none", False),
            (
                {"inner_opt": "adam", "momentum": "optimizer"},
                "optimizer: Adam keeps its own, however sparse pushes are",
                True,
            ),
        ],
    )
    def test_names_the_numbers(self, training: Options, text: str, warns: bool) -> None:
        assert describe_momentum(TrainingConfig(**training)) == (text, warns)

    def test_of_a_class_that_is_not_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("topq_dist.ps.training.inner_step.momentum_rule", lambda _: None)
        text, warns = describe_momentum(TrainingConfig(inner_opt="muon"))
        assert text == "feedback: how Muon steps without is not known, so it keeps its own"
        assert warns
        model = random_model(SINGLE)
        central_of("adamw", model).apply(
            pushes_at(model, torch.Generator().manual_seed(12), SPARSE)
        )

    @pytest.mark.parametrize(
        ("given", "level"), [(None, logging.WARNING), ("optimizer", logging.INFO)]
    )
    def test_at_the_start_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, given: Any, level: int
    ) -> None:
        folder = TestSnapshots.old_folder(tmp_path)
        with caplog.at_level(logging.INFO), StateDir(folder) as state_dir:
            training = TrainingConfig(**OF_BEFORE, momentum=given)
            coordinator = Coordinator(training, ServingConfig(), state_dir)
            coordinator.drain()
        said = [r for r in caplog.records if r.getMessage().startswith("momentum: ")]
        assert [(r.levelno, r.getMessage()) for r in said] == [
            (level, "momentum: optimizer: SGD keeps its own, however sparse pushes are")
        ]

    def test_a_momentum_that_cannot_be_taken_out_is_refused_at_the_start(
        self, tmp_path: Path
    ) -> None:
        training = TrainingConfig(inner_opt="sgd", options={"momentum": 1.0})
        with (
            StateDir(tmp_path) as folder,
            pytest.raises(
                ValueError, match=r"inner_opt='sgd' with momentum=1\.0: expected a number"
            ),
        ):
            Coordinator(training, ServingConfig(), folder)
