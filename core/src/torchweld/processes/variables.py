"""The variables that say which process this is: torchrun's, or SLURM's where torchrun's are absent.

Pure: what is read is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torchweld.errors import RunError

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, the ``deepspeed`` launcher and ``accelerate launch`` set."""

_BATCH_SCRIPTS = ("4294967291", "4294967290", "")  # step numbers of no srun step
_FIRST_PORT, _NUM_PORTS = 15000, 15000  # below those that Linux hands out by itself


def slurm_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what torchrun would have set, for a task of a SLURM step of several tasks.

    Empty where torchrun's variables are there, outside SLURM, in a step of one task, and in a batch
    script, which is one process whatever ``--ntasks`` says: only ``srun`` starts the others.

    Raises:
        RunError: the step does not say on which hosts it is.

    >>> slurm_variables({"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4",
    ...     "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "61", "MASTER_PORT": "29400"})
    ... # doctest: +NORMALIZE_WHITESPACE
    {'RANK': '3', 'LOCAL_RANK': '1', 'WORLD_SIZE': '4', 'MASTER_ADDR': 'gpu07',
     'MASTER_PORT': '29400'}
    """
    num_tasks = _num_tasks(environ)
    if num_tasks < 2 or "RANK" in environ or "WORLD_SIZE" in environ:
        return {}
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": str(num_tasks),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _master(environ),
        "MASTER_PORT": environ.get("MASTER_PORT") or _port(environ),
    }


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's compressed list.

    >>> first_host("gpu[07-10,12],login"), first_host("rack[2-3]n[1-4]"), first_host("a,b")
    ('gpu07', 'rack2n1', 'a')
    """
    first = re.split(r",(?![^\[]*\])", nodes.strip())[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _num_tasks(environ: Mapping[str, str]) -> int:
    if "SLURM_PROCID" not in environ:
        return 1
    counted = environ.get("SLURM_STEP_NUM_TASKS")
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    if counted is None and step not in _BATCH_SCRIPTS:
        counted = environ.get("SLURM_NTASKS", environ.get("SLURM_NPROCS"))
    return int(counted or 1)


def _master(environ: Mapping[str, str]) -> str:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environ.get(name):
            return first_host(environ[name])
    raise RunError(
        "SLURM started several tasks, but SLURM_STEP_NODELIST and SLURM_JOB_NODELIST are not set: "
        "set MASTER_ADDR to the host of the first task"
    )


def _port(environ: Mapping[str, str]) -> str:
    """The same on every task, and another one for every step of a job."""
    numbers = [environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    job, step = (int(number) if number.isdigit() else 0 for number in numbers)
    return str(_FIRST_PORT + (job * 31 + step) % _NUM_PORTS)
