"""Two network namespaces that stand for two machines, each with its own ports and processes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """One of them.

    Attributes:
        name: of the namespace.
        address: its IP address.
        interface: the only one beside the loopback.
    """

    name: str
    address: str
    interface: str

    def command(self, *words: str) -> list[str]:
        """``words`` as a command in this host, with processes of its own."""
        own_processes = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        return ["ip", "netns", "exec", self.name, *own_processes, *words]


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "needs ip (iproute2) and unshare (util-linux), for network namespaces"
    name = f"tw{os.getpid()}x"
    if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
        return "network namespaces cannot be made here, though this is root"
    _ip("netns", "del", name)
    return ""


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them; everything in them ends with the context."""
    number = os.getpid()
    hosts = tuple(
        Host(f"tw{number}{side}", f"10.77.{number % 250}.{i + 1}", f"tw{number}{side}")
        for i, side in enumerate("ab")
    )
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        a, b = hosts
        _ip("link", "add", a.interface, "type", "veth", "peer", "name", b.interface)
        for host in hosts:
            _ip("link", "set", host.interface, "netns", host.name)
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", host.interface, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield a, b
    finally:
        for host in hosts:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", host.name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)
