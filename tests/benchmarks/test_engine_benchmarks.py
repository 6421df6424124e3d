import json
import os
import subprocess
import sys
import time
from pathlib import Path

import device
import device_ddp
import frame_size
import pytest
import selection
import torch
from triton_version import check_interpreter


def test_selection_reports_every_method_and_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        selection.main(
            [
                *("--numel", "20000", "--q", "0.99", "--threads", "1"),
                *("--warm-up", "2", "--steps", "3", "--out", str(tmp_path)),
            ]
        )
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "selection.json").read_text())["rows"]
    assert [row["method"] for row in rows if not row["part"]] == [
        selection.MEMCPY,
        selection.OURS,
        selection.TOPK,
        "np.partition",
        "DGC, sampled threshold",
    ]
    assert len([row for row in rows if row["part"]]) == 5
    assert all(len(row["times_s"]) == 3 and min(row["times_s"]) > 0 for row in rows)
    assert next(row["memcpys"] for row in rows if row["method"] == selection.MEMCPY) == 1.0
    assert (tmp_path / "selection.png").stat().st_size > 1000
    assert "compress()" in capsys.readouterr().out


@pytest.mark.parametrize("distribution", ["normal", "laplace"])
def test_frames_stay_within_the_bounds_of_their_formats(
    distribution: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--numel", "1000000", "--densities", "0.015625", "0.001")
    frame_size.main([*sizes, "--distribution", distribution, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "frame_size.json").read_text())["rows"]
    assert [row["k"] for row in rows] == [15625] * 11 + [1000] * 11
    for row in rows:
        assert row["index_bits"] >= row["least_index_bits"]
        assert 0.0 < row["over"] < 0.2
        assert row["frame_bytes"] <= row["slot_bytes"]
        assert (row["encode_times"] is None) == (row["value_format"] not in frame_size.FIXED)
    at = {row["value_format"]: row for row in rows[:11]}
    # SparseLoCo's 14 bits a value are 146 x
    assert at["ec2"]["times_smaller_than_fp32"] > 207
    assert at["ec1"]["times_smaller_than_fp32"] > 220
    assert at["ec2"]["error"] < 0.5 * at["int2"]["error"]
    assert at["ec2"]["value_bits"] < 1.01 * at["int2"]["value_bits"]
    assert at["ec1"]["error"] < 1.1 * at["int2"]["error"]
    for name, fixed in frame_size.FIXED.items():
        assert at[name]["value_bits"] < 1.02 * at[name]["least_value_bits"]
        if name in ("ecfp16", "ecbf16"):
            assert at[name]["error"] == at[fixed]["error"]
    assert (tmp_path / "frame_size.png").stat().st_size > 1000
    assert "over the bound" in capsys.readouterr().out


def test_the_device_benchmark_runs_on_any_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--numel", "5000", "--q", "0.99", "--warm-up", "2", "--steps", "3")
    device.main(["--device", "cpu", *few, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "device.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [
        device.COPY,
        device.OURS,
        device.TOPK,
        device.SAMPLED,
    ]
    assert all(len(row["times_s"]) == 3 and row["gradient_gb_per_s"] > 0 for row in rows)
    assert "GB/s of gradient" in capsys.readouterr().out


@pytest.mark.gloo
@pytest.mark.timeout(600)
def test_a_dry_run_of_it_goes_through_every_part(tmp_path: Path) -> None:
    check_interpreter()
    # in every process that it starts: the interpreter is some times as fast as it comes
    (tmp_path / "sitecustomize.py").write_text("import interpreted\n")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1]), str(device.ROOT)])
    command = [sys.executable, device.__file__, "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "device.json").read_text())
    assert report["engine_on_device"]
    assert device.STAGES in {row["method"] for row in report["rows"]}
    ended = report["ended"]
    assert ended.pop("2000 elements, q = 0.99") == "measured"
    assert len(ended) == 3
    assert all(how.endswith("(exit 0)") for how in ended.values()), ended
    assert "tests collected" in ended["tests"]
    for name, methods in (("device_ddp", 5), ("device_ddp_2", 4)):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["failed"] == {}
        assert len(found["rows"]) == methods
    assert len(list(tmp_path.glob("*_trace.json"))) == 9


def test_what_it_starts_has_an_end(tmp_path: Path) -> None:
    sleeps = "import subprocess, sys; print('begun', flush=True); "
    sleeps += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started_s = time.monotonic()
    log = tmp_path / "log.txt"
    assert device.told([sys.executable, "-c", sleeps], 1.0, {}, log) == "no end within 1 s"
    assert time.monotonic() - started_s < 20
    rows = device.measure(torch.device("cpu"), 1000, 0.9, 1, 1000, time.monotonic())
    assert {len(row.times_s) for row in rows} == {1}


def test_gaps_in_a_trace() -> None:
    def kernel(stream: int, start: float, lasts: float) -> dict[str, object]:
        return {"cat": "kernel", "ts": start, "dur": lasts, "args": {"stream": stream}}

    others = [kernel(9, 0, 5), kernel(9, 90, 5), {"cat": "cpu_op", "ts": 0, "dur": 900}]
    backward = [kernel(7, 50, 20), kernel(7, 0, 40), kernel(7, 65, 10), kernel(7, 78, 2)]
    assert device_ddp.idle_of([*others, *backward]) == (13.0, 10.0)
    assert device_ddp.idle_of(others[2:]) is None
