"""Two machines train together; a worker that is killed is started again and nothing is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.scripts import train_elastically
from tests.core.test_failures import launched
from tests.core.two_hosts import Host, two_hosts, why_not

PORT = 29477
ROOT = Path(__file__).parents[2]


def torchrun(host: Host, meeting: Host, directory: Path, *words: str) -> subprocess.Popen[bytes]:
    """The agent of one host; its output goes to ``<host>.txt``."""
    script = str(Path(train_elastically.__file__))
    options = [
        "--nnodes=2",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--monitor-interval=0.1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meeting.address}:{PORT}",
        f"--rdzv-conf=is_host={host is meeting}",
        # The name of the machine means neither of them.
        f"--local-addr={host.address}",
    ]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": host.interface,
        "TORCHWELD_TIMEOUT_SECONDS": "60",
        "RES_OPTIONS": "timeout:1 attempts:1",  # no name server answers in there
    }
    command = [sys.executable, "-m", "torchweld", "launch", *options, script, *words]
    with (directory / f"{host.address}.txt").open("wb") as output:
        return subprocess.Popen(
            host.command(*command),
            cwd=directory,
            env=environ,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.slow
def test_two_hosts_end_with_the_same_weights_though_a_worker_is_killed(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    whole = tmp_path / "whole"
    whole.mkdir()
    with launched(whole, "none", "die", "0") as undisturbed:
        assert undisturbed.codes() == [0, 0]
        expected = undisturbed.output(0).splitlines()[-1]

    with two_hosts() as (a, b):
        agents = [torchrun(host, a, tmp_path, "die", "1", "runs") for host in (a, b)]
        try:
            codes = [agent.wait(240) for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
                agent.wait(30)

    told = [(tmp_path / f"{host.address}.txt").read_text() for host in (a, b)]
    assert codes == [0, 0], "\n".join(told)
    assert (tmp_path / "harmed-1").exists()
    assert re.findall("weights .*", "".join(told)) == [expected, expected]
    assert "resumed runs/" in "".join(told)
