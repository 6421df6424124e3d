"""The hook's state as a file in a trainer's checkpoint folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from topq_dist.ddp.hook import TopQState

STATE_FILE = "topq_state.pt"


def save_state(
    state: TopQState, folder: str | os.PathLike[str], *, file_name: str = STATE_FILE
) -> None:
    """Write the states of all ranks into one file of a folder; a collective, which rank 0 writes.

    The file is whole or not there. Raises RuntimeError before the first backward pass of a state
    that was made for a model which was not wrapped yet.
    """
    saved = state.state_dict(all_ranks=True)
    if not saved:
        return
    path = Path(folder) / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save(saved, unfinished)
    unfinished.replace(path)


def load_state(
    state: TopQState, folder: str | os.PathLike[str], *, file_name: str = STATE_FILE
) -> None:
    """Resume from what `save_state` has written, on any number of ranks; each reads the file.

    Raises FileNotFoundError where it is not there, and what `TopQState.load_state_dict` raises.
    """
    path = Path(folder) / file_name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the hook's state there, since the run goes on from this checkpoint; "
            "it was saved without the hook, or this rank does not see the folder"
        )
    state.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
