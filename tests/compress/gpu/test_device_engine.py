"""The engine on a device: where it runs, and that frames made with it are those of the CPU."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from interpreted import DEVICE

from topq_dist import Compressor
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.gpu import engine
from topq_dist.compress.layout import Layout
from topq_dist.compress.sparsify.segments import uniform_segments

CPU = torch.device("cpu")


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPQ_GPU", "interpret" if DEVICE == "cpu" else "1")


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_frames_of_a_gpu_are_those_of_the_cpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu, on_cpu = Compressor(q=0.99), Compressor(q=0.99)
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        gradient = torch.randn(10_003, generator=generator).to(dtype)
        frame = on_gpu.compress("gradient", gradient.to(DEVICE))
        out = on_gpu.decompress(frame, torch.empty_like(gradient, device=DEVICE))
        with monkeypatch.context() as patched:
            patched.setenv("TOPQ_GPU", "0")
            assert torch.equal(frame, on_cpu.compress("gradient", gradient))
        assert torch.equal(out.cpu(), on_cpu.decompress(frame, torch.empty_like(gradient)))
    for name, residual in on_cpu.state_dict().items():
        assert torch.equal(on_gpu.state_dict()[name].cpu(), residual)
    gradient = torch.ones(10_003, dtype=dtype)
    wanted = on_cpu.compress("gradient", gradient)
    for copied in (copy.deepcopy(on_gpu), pickle.loads(pickle.dumps(on_gpu))):  # noqa: S301
        assert torch.equal(copied.compress("gradient", gradient.to(DEVICE)), wanted)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("numels", [[0], [0, 1, 0], [3000, 1, 70]])
def test_parts_and_segments_of_all_sizes(
    numels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(
        names=tuple(map(str, range(len(numels)))), shapes=tuple((numel,) for numel in numels)
    )
    segments = uniform_segments(numels, q=0.9, scope="parameter")
    compressors = [
        TopKCompressor(value_format="int2", error_feedback=True, bound=1.0) for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        gradient = torch.randn(layout.numel, generator=generator)
        frames = []
        for setting, compressor in zip(["1", "interpret"], compressors, strict=True):
            monkeypatch.setenv("TOPQ_GPU", setting)
            device = DEVICE if setting == "interpret" else "cpu"
            monkeypatch.setenv("TOPQ_GPU", setting if device == "cpu" else "1")
            made = compressor.compress(gradient.to(device), layout, segments, parts=2)
            compressor.residuals.apply(made.update)
            frames.append(made.frames)
        assert all(torch.equal(one, other) for one, other in zip(*frames, strict=True))


def test_only_known_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPQ_GPU", "yes")
    with pytest.raises(ValueError, match="TOPQ_GPU='yes': expected one of 0, 1, interpret"):
        engine.runs_on(CPU)
    monkeypatch.setenv("TOPQ_GPU", "interpret")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    engine._is_interpreted.cache_clear()
    with pytest.raises(ValueError, match="without TRITON_INTERPRET"):
        engine.runs_on(CPU)
    engine._is_interpreted.cache_clear()
    for setting in ("", "0", "1"):
        monkeypatch.setenv("TOPQ_GPU", setting)
        assert not engine.runs_on(CPU)
    monkeypatch.setenv("TOPQ_GPU", "0")
    assert not engine.runs_on(torch.device("cuda:0"))


@pytest.mark.parametrize("error", [ImportError("no triton"), RuntimeError("other bits")])
def test_a_device_on_which_it_does_not_work_is_told_of_once(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(device: torch.device) -> None:
        raise error

    monkeypatch.setattr(engine, "_try_out", fails)
    engine._works_on.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not any(engine.runs_on(torch.device("cuda:7")) for _ in range(3))
    engine._works_on.cache_clear()
    (record,) = caplog.records
    assert "cuda:7 are compressed by torch operations" in record.message
    assert str(error) in record.message


def test_everything_else_does_without_triton() -> None:
    imports = "import topq_dist.ddp.hook, topq_dist.hook.parts, topq_dist.compress.compressor"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['triton'] = None; {imports}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_tried_first_passes() -> None:
    engine._try_out(torch.device(DEVICE))
