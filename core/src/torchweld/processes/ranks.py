"""The processes of a run: found, named, and joined to a process group."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from torchweld.errors import InvalidArgument, RunError
from torchweld.interfaces import Env
from torchweld.processes.channel import Channel, missing
from torchweld.processes.meeting import meet
from torchweld.processes.variables import LAUNCH_VARIABLES, slurm_variables

if TYPE_CHECKING:
    from torchweld.processes.beside import BesideExchange


class Ranks:
    """This process among the others, with what they need to agree on something.

    Attributes:
        env: rank, world size, device, and the process group once there is one.
        rank: this process.
        world_size: how many processes there are.
    """

    def __init__(self, env: Env, channel: Channel | None = None) -> None:
        self.env = env
        self.rank, self.world_size = env.rank, env.world_size
        self._channel = channel if channel is not None else Channel(env.rank, env.world_size)

    def exchange(self, label: str, text: str) -> list[str]:
        """Give ``text`` to all ranks and return everybody's; see :meth:`Channel.exchange`."""
        return self._channel.exchange(label, text)

    def beside(self, kind: str) -> BesideExchange:
        """Return an exchange for a thread beside the main one; see :meth:`Channel.beside`."""
        return self._channel.beside(kind)

    @contextmanager
    def first_cause(self, where: Mapping[str, Any]) -> Iterator[None]:
        """Around the work of a run: an error on one rank ends all, with the first cause.

        Args:
            where: read when something fails: ``{"doing": "step 118", "note": "…"}``.
        """
        with self._channel.first_cause(where):
            yield

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add ``tensor`` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.env.group)
        return tensor

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
            dist.init_process_group(
                backend[self.env.device.type],
                store=dist.PrefixStore(
                    self._channel.next_key("group"), self.env.store or dist.HashStore()
                ),
                rank=self.rank,
                world_size=self.world_size,
                timeout=_hang_timeout(),
            )
            self._channel.group = dist.group.WORLD
        self.env = replace(self.env, group=dist.group.WORLD)


# ---- launch --------------------------------------------------------------------------------------

_launched: dict[tuple[str, ...], tuple[Env, Channel]] = {}
"""The one launch of this process, as torch keeps its one default group."""


def launch(accelerator: str = "auto") -> Ranks:
    """Find out which process this is; the store is made here, the process group by ``join``.

    Reads the variables that torchrun sets. In a SLURM step of several tasks without them they are
    set as torchrun would have, for whatever else reads them: the user's script, a wrapped library.
    Otherwise there is one process. A process group that exists already is taken over, and left.

    Raises:
        InvalidArgument: ``accelerator="cuda"`` without a CUDA device.
        RankMissing: the process that hosts the store is not there.
        RunError: only some of the launch variables are set.
    """
    env, channel = _known_launch()
    return Ranks(replace(env, device=_device(accelerator, env.local_rank)), channel)


def _known_launch() -> tuple[Env, Channel]:
    """The launch, made once: a second channel would find what the first has said."""
    group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    ours = [launch for launch in _launched.values() if launch[1].group is group]
    if group is not None and ours:
        return ours[0]
    if group is None:
        os.environ.update(slurm_variables(os.environ))
    key = (*(os.environ.get(v, "") for v in LAUNCH_VARIABLES), _attempt(), _name(group))
    if key not in _launched:
        _launched.clear()
        _launched[key] = _launch() if group is None else _existing_group()
    return _launched[key]


def _name(group: Any) -> str:
    return "" if group is None else f"{group.group_name} {id(group)}"


def launched_world_size() -> int:
    """How many processes were launched, known without a store: for choices made before launch."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    environ = {**os.environ, **slurm_variables(os.environ)}
    return int(environ.get("WORLD_SIZE", "1"))


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _launch() -> tuple[Env, Channel]:
    present = [name for name in LAUNCH_VARIABLES if name in os.environ]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Env(0, 1, 0, torch.device("cpu")), Channel(0, 1)
    if len(present) < len(LAUNCH_VARIABLES):
        lacking = ", ".join(name for name in LAUNCH_VARIABLES if name not in present)
        raise RunError(
            f"WORLD_SIZE={world_size} is set but {lacking} is not: start the script with "
            f"torchrun --nproc-per-node {world_size} script.py"
        )
    rank = int(os.environ["RANK"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    base = _connect(rank, world_size, hosts=rank == 0 and not agent)
    # A store that this launch made itself is empty.
    name = meet(base, rank, world_size, _timeout_seconds()) if agent else "attempt"
    store = dist.PrefixStore(name, base)
    channel = Channel(
        rank,
        world_size,
        store=store,
        watch_store=dist.PrefixStore(name, _connect(rank, world_size, hosts=False)),
        host=None if agent else 0,
        timeout_seconds=_timeout_seconds(),
    )
    return Env(rank, world_size, local_rank, torch.device("cpu"), store=store), channel


def _connect(rank: int, world_size: int, *, hosts: bool) -> dist.Store:
    """Open a connection to the launch's store.

    Raises:
        RankMissing: its host does not answer.
    """
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size,
            is_master=hosts,
            timeout=timedelta(seconds=_timeout_seconds()),
            # Waiting here would end in "1/2 clients joined", which names nobody.
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        if rank == 0:
            raise
        raise missing([0], world_size, "the launch", _timeout_seconds()) from error
    return dist.PrefixStore("torchweld", store)


def _existing_group() -> tuple[Env, Channel]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    # There is no public way to the store of a group that somebody else made.
    store = dist.PrefixStore("torchweld", dist.distributed_c10d._get_default_store())
    channel = Channel(
        rank,
        world_size,
        store=store,
        host=0,
        timeout_seconds=_timeout_seconds(),
    )
    device = torch.device("cpu")
    return Env(rank, world_size, local_rank, device, dist.group.WORLD, store), channel


def _timeout_seconds() -> float:
    return float(os.environ.get("TORCHWELD_TIMEOUT_SECONDS", "300"))


def _hang_timeout() -> timedelta | None:
    """How long a collective waits for another rank; None: as long as torch has it, 10 to 30 min."""
    seconds = os.environ.get("TORCHWELD_HANG_SECONDS")
    return None if seconds is None else timedelta(seconds=float(seconds))


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
