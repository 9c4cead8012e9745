"""How the processes of ranks are started and ended: what they get, and from where."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch

from torchweld.errors import InvalidArgument
from torchweld.testing.rank_worker import Job

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from torchweld.testing import rank_worker; rank_worker."
)

# A client of the store asks a name server who ::ffff:127.0.0.1 is, for a message that it may log.
# Where none answers it would wait 5 s and try again.
_RESOLVER = {"RES_OPTIONS": "timeout:1 attempts:1"}


class _RecordingPickler(pickle.Pickler):
    """Notes the modules of all classes and functions that the pickle will ask for."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.modules: dict[str, str] = {}

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
            name = getattr(value, "__module__", None) or ""
            file = getattr(sys.modules.get(name), "__file__", None)
            if file and name != "__main__":
                self.modules[name] = file
        return NotImplemented


def make_job(
    function: Callable[..., Any], args: tuple[Any, ...], environ: Mapping[str, str], directory: str
) -> Job:
    """Pack a call for one rank, with the modules that it needs."""
    buffer = io.BytesIO()
    pickler = _RecordingPickler(buffer)
    try:
        pickler.dump((function, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InvalidArgument(
            f"{function!r} with its arguments cannot be sent to another process: {error}; give a "
            "function, classes and values that are defined at the top of a module"
        ) from error
    return Job(buffer.getvalue(), pickler.modules, tuple(sys.path), environ, directory)


@contextmanager
def hosted_store() -> Iterator[dict[str, str]]:
    """Host the store of one job here, as torchrun does: no rank then waits for rank 0 to start."""
    # An IPv4 socket of our own: on torch's, each peer is ::ffff:127.0.0.1, and the server waits
    # for its name, too (see _RESOLVER); 127.0.0.1 is in the hosts file.
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    port = int(listening.getsockname()[1])
    store = torch.distributed.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
        use_libuv=False,  # which cannot take a socket
    )
    yield {**store_environ(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    del store


def store_environ(port: int) -> dict[str, str]:
    """Where the store of a job is."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def rank_environ(rank: int, world_size: int) -> dict[str, str]:
    """The variables of one rank that torchrun would set."""
    ours = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }
    if sys.platform == "linux":
        # Gloo otherwise asks for the address of the host's name, which a bare container lacks.
        ours["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return ours


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def python_command(call: str) -> list[str]:
    """A command that calls a function of ``rank_worker`` with this process's ``sys.path``."""
    return [sys.executable, "-c", _BOOT + call, json.dumps([p for p in sys.path if p])]


def start(
    command: Sequence[str],
    output: Path,
    environ: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Start a process whose standard output and error go to a file."""
    environ = {**_RESOLVER, **os.environ, **(environ or {})}
    # A session of its own: Ctrl-C reaches the tests only, and `kill` reaches its children.
    with output.open("wb") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environ,
            **options,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started, and wait for its end."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
