"""Arguments of the worker's optimizer: checked, and made plain."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Sequence

from torch import Tensor

from topq_dist.dtypes import check_plain
from topq_dist.ps.protocol.errors import InvalidError
from topq_dist.ps.protocol.types import check_worker_name
from topq_dist.ps.security.many_addresses import in_many


def by_gradient(
    named_parameters: Iterable[tuple[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters that need a gradient, and the others, by name.

    Names are without torch.compile's prefix. Raises TypeError or ValueError for what is not like
    model.named_parameters().
    """
    named: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    for entry in named_parameters:
        if not isinstance(entry, tuple) or len(entry) != 2 or not isinstance(entry[1], Tensor):
            raise TypeError(
                f"named_parameters holds a {type(entry).__name__}: expected pairs of a name and a "
                "tensor, as model.named_parameters() has them"
            )
        name = str(entry[0]).replace("_orig_mod.", "")  # of torch.compile
        if name in named or name in frozen:
            raise ValueError(f"named_parameters has {name!r} twice: expected distinct names")
        if entry[1].requires_grad:
            check_plain(name, entry[1])
        (named if entry[1].requires_grad else frozen)[name] = entry[1]
    if not named:
        raise ValueError("named_parameters has no trainable parameter: expected one at least")
    return named, frozen


def addresses_of(servers: str | Sequence[str]) -> list[str]:
    """Return the servers' addresses, each by itself; raises TypeError for what are none.

    ValueError for a range "[A-B]" that is none.
    """
    texts = [servers] if isinstance(servers, str) else servers
    if not isinstance(texts, Sequence) or not all(isinstance(one, str) for one in texts):
        raise TypeError(f"servers={servers!r}: expected HOST:PORT, or several of them in a list")
    return [address for text in texts for address in in_many(text)]


def checked_worker(worker: str | None) -> str:
    """Return a worker's name, made up for None; raises ValueError where it can name none."""
    if worker is None:
        host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:40]
        rank = os.environ.get("RANK")
        worker = f"{host}-{os.getpid()}" if rank is None else f"rank-{rank}"
    try:
        return check_worker_name(worker)
    except InvalidError as error:
        raise ValueError(str(error)) from None
