"""``torchweld launch``: torchrun with the settings that a training on this machine needs.

torchrun stays what starts, watches and restarts the processes; its options are not read twice.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence

import torch.distributed.run as torchrun

_RENDEZVOUS = ("--standalone", "--rdzv", "--nnodes", "--node-rank", "--master", "--local-addr")


def launch_words(words: Sequence[str]) -> list[str]:
    """Return torchrun's words: on one machine it needs to be told that it is alone.

    Without ``--standalone`` two launches of one machine meet at one port.

    >>> launch_words(["--nproc-per-node", "2", "train.py", "--nnodes", "7"])
    ['--standalone', '--nproc-per-node', '2', 'train.py', '--nnodes', '7']
    >>> launch_words(["--nnodes=2", "train.py"])
    ['--nnodes=2', 'train.py']
    """
    given = torchrun.parse_args(list(words))
    own = words[: len(words) - len(given.training_script_args) - 1]
    meets = any(word.replace("_", "-").startswith(_RENDEZVOUS) for word in own)
    return [*words] if meets else ["--standalone", *words]


def num_threads(num_processes: int, num_cores: int) -> int:
    """Return the threads of each process, so that all together have as many as there are cores.

    >>> num_threads(4, 16), num_threads(8, 2)
    (4, 1)
    """
    return max(1, num_cores // num_processes)


def prepare(words: Sequence[str], environ: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return torchrun's words, and the variables that are to be set for it.

    Args:
        words: torchrun's options, the script, its arguments.
        environ: the variables that there are; what the user has set stays.
    """
    given = torchrun.parse_args(list(words))
    added: dict[str, str] = {}
    if "OMP_NUM_THREADS" not in environ:
        # What this process may use, not what the machine has: a container or a SLURM task is given
        # a part of it.
        cores = len(os.sched_getaffinity(0))
        added["OMP_NUM_THREADS"] = str(num_threads(_num_processes(given), cores))
    return launch_words(words), added


def _num_processes(given: Namespace) -> int:
    count: int = torchrun.determine_local_world_size(given.nproc_per_node)
    return count
