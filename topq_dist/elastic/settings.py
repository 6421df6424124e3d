"""How a rank of an elastic run finds the others, and when it takes one for lost."""

from __future__ import annotations

import datetime as dt
import os
from dataclasses import dataclass

import torch.distributed as dist

from topq_dist.validation import check_number

_STORE_TIMEOUT = dt.timedelta(seconds=30)
_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class Elastic:
    """A rank's place in a run that goes on where ranks are lost, and comes back.

    store: "host:port" of a TCPStore that outlives every rank, such as what `python -m
        topq_dist.elastic.store` keeps. run: name of the run there. name: this rank's place in it,
        the same for the process that takes its place. ranks: how many the run begins with. lease_s:
        seconds without a sign of life after which a rank is taken for lost.

    Raises TypeError or ValueError for a value out of place, naming it.
    """

    store: str
    name: str
    ranks: int
    run: str = "run"
    lease_s: float = 10.0

    def __post_init__(self) -> None:
        for field in ("store", "name", "run"):
            text = getattr(self, field)
            if not isinstance(text, str):
                raise TypeError(f"{field}={text!r}: expected a string")
            if not text:
                raise ValueError(f"{field}={text!r}: expected a name that is not empty")
        host, _, port = self.store.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"store={self.store!r}: expected host:port")
        if isinstance(self.ranks, bool) or not isinstance(self.ranks, int):
            raise TypeError(f"ranks={self.ranks!r}: expected an integer")
        if self.ranks < 1:
            raise ValueError(f"ranks={self.ranks}: expected a number of ranks above zero")
        if check_number("lease_s", self.lease_s) < 1.0:
            raise ValueError(
                f"lease_s={self.lease_s!r}: expected a second or more, since a busy rank gives "
                "signs of life late"
            )

    @classmethod
    def from_environment(cls) -> Elastic:
        """Return what MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE say; raise where they do not.

        Raises RuntimeError under a torchrun that has started several ranks: it ends all of them
        where one fails.
        """
        missing = [name for name in _VARIABLES if name not in os.environ]
        if missing:
            raise ValueError(
                f"elastic=True without {', '.join(missing)} in the environment: expected the "
                "address of a store that outlives the ranks, this one's number and how many begin; "
                "or give Elastic(store=..., name=..., ranks=...)"
            )
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
            raise RuntimeError(
                "elastic=True under a torchrun of several ranks, which ends all of them where one "
                "fails: expected each rank started by itself, such as with --nproc-per-node 1"
            )
        rank, ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
        if not rank.isdecimal() or not ranks.isdecimal():
            raise ValueError(f"RANK={rank!r} WORLD_SIZE={ranks!r}: expected whole numbers")
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return cls(store=address, name=rank, ranks=int(ranks))

    def connect(self) -> dist.Store:
        """Return a client of the store, for this run alone.

        Raises ConnectionError where there is none, saying how one is started.
        """
        host, _, port = self.store.rpartition(":")
        try:
            store = dist.TCPStore(
                host, int(port), None, False, timeout=_STORE_TIMEOUT, wait_for_workers=False
            )
        except (RuntimeError, ValueError) as error:
            raise ConnectionError(
                f"store={self.store!r} does not answer ({error}): expected a TCPStore that "
                f"outlives the ranks, such as python -m topq_dist.elastic.store {self.store}"
            ) from error
        return dist.PrefixStore(f"topq/{self.run}", store)


def check_elastic(elastic: bool | Elastic) -> Elastic | None:
    """Return the settings, those of the environment for True, or None for False."""
    if isinstance(elastic, Elastic):
        return elastic
    if not isinstance(elastic, bool):
        raise TypeError(f"elastic={elastic!r}: expected True, False or an Elastic")
    return Elastic.from_environment() if elastic else None
