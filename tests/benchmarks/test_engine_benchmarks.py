import json
from pathlib import Path

import device
import frame_size
import pytest
import selection
import torch


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


def test_frame_size_reports_every_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame_size.main(["--numel", "50000", "--densities", "0.01", "0.001", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "frame_size.json").read_text())["rows"]
    assert [row["k"] for row in rows] == [500] * 7 + [50] * 7
    for row in rows:
        assert row["index_bits"] >= row["least_index_bits"]
        assert 0.0 < row["over"] < 1.0
        assert row["frame_bytes"] <= row["slot_bytes"]
    assert (tmp_path / "frame_size.png").stat().st_size > 1000
    assert "over the bound" in capsys.readouterr().out


def test_the_device_benchmark_runs_on_any_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--numel", "5000", "--q", "0.99", "--warm-up", "2", "--steps", "3")
    device.main(["--device", "cpu", *few, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "device.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [device.COPY, device.OURS, device.TOPK]
    assert all(len(row["times_s"]) == 3 and row["gradient_gb_per_s"] > 0 for row in rows)
    assert "GB/s of gradient" in capsys.readouterr().out
