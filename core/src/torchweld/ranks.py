"""The processes of a run: found, named, compared, and told when one of them stops."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from torchweld.errors import InvalidArgument, RankFailed, RankMissing, RunError
from torchweld.interfaces import Env

_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_SECONDS = 0.005
_LAST_READ_SECONDS = 10.0  # how long the host of the store waits for the others' last look


def _timeout_seconds() -> float:
    return float(os.environ.get("TORCHWELD_TIMEOUT_SECONDS", "300"))


class Ranks:
    """This process among the others, with what they need to agree on something.

    Everything here goes through the launch's key-value store, so that it works before there is a
    process group, and with any back end.

    Attributes:
        env: rank, world size, device, and the process group once there is one.
    """

    def __init__(self, env: Env, *, hosts_store: bool = False) -> None:
        self.env = env
        self.timeout_seconds = _timeout_seconds()
        self._hosts_store = hosts_store
        self._count = 0

    @property
    def rank(self) -> int:
        """This process."""
        return self.env.rank

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return self.env.world_size

    # ---- agreement -----------------------------------------------------------------------------

    def exchange(self, label: str, text: str) -> list[str]:
        """Give ``text`` to all ranks and return everybody's, in rank order; also a barrier.

        Raises:
            RankMissing: a rank did not come here in time; names it and ``label``.
            RankFailed: another rank stopped meanwhile.
        """
        if self.world_size == 1:
            return [text]
        self._count += 1
        prefix = f"torchweld/exchange/{self._count}"
        self.env.store.set(f"{prefix}/{self.rank}", f"{label}\n{text}")  # type: ignore[union-attr]  # several ranks have a store
        self._wait_for([f"{prefix}/{rank}" for rank in range(self.world_size)], label)
        answers = [self._get(f"{prefix}/{rank}") for rank in range(self.world_size)]
        self._check_same_place(label, [answer.partition("\n")[0] for answer in answers])
        return [answer.partition("\n")[2] for answer in answers]

    def _check_same_place(self, label: str, labels: list[str]) -> None:
        for rank, other in enumerate(labels):
            if other != label:
                raise RunError(
                    f"rank {self.rank} is at {label!r} while rank {rank} is at {other!r}: every "
                    "process must make the same calls of torchweld in the same order"
                )

    def _wait_for(self, keys: list[str], label: str) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        while not self.env.store.check(keys):  # type: ignore[union-attr]  # several ranks have a store
            self.raise_first_failure()
            if time.monotonic() > deadline:
                missing = [r for r, key in enumerate(keys) if not self.env.store.check([key])]  # type: ignore[union-attr]  # as above
                raise RankMissing(
                    f"rank {', '.join(map(str, missing))} of {self.world_size} did not arrive at "
                    f"{label!r} within {self.timeout_seconds:g} s: look for its own error above, or "
                    "start all processes (TORCHWELD_TIMEOUT_SECONDS sets the time)"
                )
            time.sleep(_POLL_SECONDS)

    def _get(self, key: str) -> str:
        return bytes(self.env.store.get(key)).decode()  # type: ignore[union-attr]  # several ranks have a store

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add ``tensor`` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.env.group)
        return tensor

    # ---- failure -------------------------------------------------------------------------------

    @contextmanager
    def first_cause(self, where: Mapping[str, Any]) -> Iterator[None]:
        """Around the work of a run: an error here is told to the others, theirs are told here.

        Args:
            where: read when something fails: ``{"doing": "step 118", "note": "…"}``.
        """
        try:
            yield
        except GeneratorExit:  # a run that was never closed is no failure
            raise
        except BaseException as error:
            if self.world_size > 1:
                self._report(error, where)
            raise

    def _report(self, error: BaseException, where: Mapping[str, Any]) -> None:
        if isinstance(error, RankFailed):
            return
        if isinstance(error, RuntimeError) and _looks_like_lost_contact(error):
            self._raise_cause_of(error)
        text = f"{type(error).__name__}: {error}".strip()
        cause = f"rank {self.rank} stopped in {where.get('doing', 'set-up')}: {text}"
        try:
            if self.env.store.add("torchweld/failures", 1) == 1:  # type: ignore[union-attr]  # several ranks have a store
                self.env.store.set("torchweld/failure", cause)  # type: ignore[union-attr]  # as above
            self.leave()
        except dist.DistStoreError:
            pass  # the store is gone with its host: there is nobody left to tell

    def _raise_cause_of(self, error: RuntimeError) -> None:
        """Raise the first cause if one is told within two seconds of losing contact."""
        for _ in range(int(2 / _POLL_SECONDS)):
            try:
                self.raise_first_failure(error)
            except dist.DistStoreError:
                return
            time.sleep(_POLL_SECONDS)

    def raise_first_failure(self, error: BaseException | None = None) -> None:
        """Raise what another rank reported, if anything.

        Raises:
            RankFailed: another rank stopped; carries its own words.
        """
        if self.env.store is not None and self.env.store.check(["torchweld/failure"]):
            cause = self._get("torchweld/failure")
            if not cause.startswith(f"rank {self.rank} "):
                raise RankFailed(f"{cause} (its traceback is in that process's output)") from error

    def leave(self) -> None:
        """Let the others read before the process that hosts the store goes."""
        if self.world_size == 1 or self.env.store is None:
            return
        self.env.store.add("torchweld/left", 1)
        deadline = time.monotonic() + _LAST_READ_SECONDS
        while self._hosts_store and time.monotonic() < deadline:
            if self.env.store.add("torchweld/left", 0) >= self.world_size:
                return
            time.sleep(_POLL_SECONDS)

    # ---- the process group ----------------------------------------------------------------------

    def join(self, backend: Mapping[str, str]) -> None:
        """Make the process group that a strategy needs, unless there is one.

        Raises:
            RunError: the strategy has no back end for this device.
        """
        if not backend:
            return
        if self.env.device.type not in backend:
            raise RunError(
                f"the strategy runs on {', '.join(backend)}, and this run is on "
                f"{self.env.device.type!r}: choose it with accelerator=…"
            )
        if not dist.is_initialized():
            store = self.env.store or dist.HashStore()
            self._count += 1
            dist.init_process_group(
                backend[self.env.device.type],
                store=dist.PrefixStore(f"torchweld/group/{self._count}", store),
                rank=self.rank,
                world_size=self.world_size,
            )
        self.env = replace(self.env, group=dist.group.WORLD)


def _looks_like_lost_contact(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("peer", "connection", "timed out", "gloo", "nccl"))


# ---- launch --------------------------------------------------------------------------------------

_launched: dict[tuple[str, ...], Ranks] = {}
"""The one launch of this process, as torch keeps its one default group."""


def launch(accelerator: str = "auto") -> Ranks:
    """Find out which process this is; the store is made here, the process group by ``join``.

    Reads the variables that torchrun sets; without them there is one process. A process group that
    exists already is taken over.

    Raises:
        InvalidArgument: ``accelerator="cuda"`` without a CUDA device.
        RunError: only some of the launch variables are set.
    """
    key = (*(os.environ.get(v, "") for v in _LAUNCH_VARIABLES), _attempt(), accelerator)
    if key not in _launched:
        _launched.clear()
        _launched[key] = _launch(accelerator)
    return _launched[key]


def launched_world_size() -> int:
    """How many processes were launched, known without a store: for choices made before launch."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _launch(accelerator: str) -> Ranks:
    if dist.is_available() and dist.is_initialized():
        return _existing_group(accelerator)
    present = [name for name in _LAUNCH_VARIABLES if name in os.environ]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Ranks(Env(0, 1, 0, _device(accelerator, 0)))
    if len(present) < len(_LAUNCH_VARIABLES):
        missing = ", ".join(name for name in _LAUNCH_VARIABLES if name not in present)
        raise RunError(
            f"WORLD_SIZE={world_size} is set but {missing} is not: start the script with "
            f"torchrun --nproc-per-node {world_size} script.py"
        )
    rank = int(os.environ["RANK"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not agent,
        timeout=timedelta(seconds=_timeout_seconds()),
        # Waiting here would end in "1/2 clients joined", which names nobody.
        wait_for_workers=False,
        multi_tenant=True,
    )
    device = _device(accelerator, local_rank)
    shared = dist.PrefixStore(f"torchweld/attempt_{_attempt()}", store)
    env = Env(rank, world_size, local_rank, device, store=shared)
    return Ranks(env, hosts_store=rank == 0 and not agent)


def _existing_group(accelerator: str) -> Ranks:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    # There is no public way to the store of a group that somebody else made.
    store = dist.PrefixStore("torchweld", dist.distributed_c10d._get_default_store())
    device = _device(accelerator, local_rank)
    return Ranks(Env(rank, world_size, local_rank, device, dist.group.WORLD, store))


def _device(accelerator: str, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if accelerator == "cuda" and not available:
        raise InvalidArgument(
            "accelerator='cuda' was asked for, but torch finds no CUDA device: choose "
            "accelerator='cpu' or 'auto'"
        )
    if accelerator == "cpu" or not available:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
