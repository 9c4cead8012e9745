"""The one place that imports deepspeed, and keeps what it does to a process away from the user.

Measured for deepspeed 0.19.8 with torch 2.7.0 and 2.13.0. On a CPU it compiles an operation for
shared memory as soon as a process group is there (20 s, and a compiler has to be found), prints on
every rank that it did, and warns that there is no GPU. It wants the place of this process in the
environment, and leaves ``torch.nn.functional.linear`` replaced for every model of the process.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from torchweld.errors import PluginError, RunError

if TYPE_CHECKING:
    from torchweld.interfaces import Env

_INSTALL = "pip install 'torchweld-deepspeed[deepspeed]'"
_SHARED_MEMORY = "deepspeed_shm_comm"
_DEPRECATED = ".*(all_gather_into_tensor|reduce_scatter_tensor).*"


def deepspeed_module(name: str = "deepspeed", *, device: torch.device | None = None) -> ModuleType:
    """Import and return deepspeed or one of its modules: ``deepspeed_module("deepspeed.zero")``.

    Args:
        name: of the module.
        device: of this run; the first import decides for the whole process.

    Raises:
        PluginError: deepspeed is missing, or does not work with this torch.
    """
    try:
        _import_root(device.type if device is not None else "")
        return importlib.import_module(name)
    except ImportError as error:
        raise PluginError(
            f"this strategy runs DeepSpeed's own engine, and importing {name} failed ({error}); "
            f"{_INSTALL}"
        ) from error


@functools.cache
def _import_root(device_type: str) -> None:
    """Import deepspeed without its compiled operation; a second call changes nothing."""
    if device_type == "cpu" or not torch.cuda.is_available():
        # Left to itself it finds that there is no GPU, and warns on every rank.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("deepspeed")
        # Gloo does what this operation would do, without a compiler.
        importlib.import_module("deepspeed.ops").__compatible_ops__[_SHARED_MEMORY] = False


@contextmanager
def deepspeed_at_work(env: Env, *, verbose: bool) -> Iterator[ModuleType]:
    """Around DeepSpeed's set-up: what it needs of the process, and its traces removed; collective.

    Args:
        env: with a process group.
        verbose: let it log what it does.

    Yields:
        The module ``deepspeed``.

    Raises:
        RunError: DeepSpeed was imported for another device.
    """
    deepspeed = deepspeed_module(device=env.device)
    _check_device(env.device)
    _forget_old_groups()
    _forget_autocast()
    _agree_on_numbers(env)
    # For the run too: what it says of its own steps is for whoever asked for it.
    _set_log_level(logging.INFO if verbose else logging.ERROR)
    _hide_deprecations()
    linear = torch.nn.functional.linear
    with _variable("LOCAL_RANK", str(env.local_rank)):  # asserted; one process is started without
        try:
            yield deepspeed
        finally:
            torch.nn.functional.linear = linear


def load_drive_access() -> None:
    """Load the operation that reads and writes a drive; compiled at its first use.

    Raises:
        RunError: it cannot be compiled here.
    """
    accelerator = deepspeed_module("deepspeed.accelerator").get_accelerator()
    try:
        accelerator.create_op_builder("AsyncIOBuilder").load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        raise RunError(
            "offloading to 'nvme' was asked for, and DeepSpeed cannot compile its operation "
            f"async_io here ({first_line(error)}): install libaio-dev, a C++ compiler and ninja, "
            "or offload to 'cpu', which needs none of them"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, without the output of a compiler that may follow."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def replace_linear() -> Callable[[], None]:
    """Compute linear layers as ``memory_efficient_linear`` has them; returns what ends it.

    Ranks that disagree here would exchange gradients in different orders, so nothing may be left
    of it for the next run.
    """
    linear = torch.nn.functional.linear
    module = deepspeed_module("deepspeed.runtime.zero.linear")
    torch.nn.functional.linear = module.zero3_linear_wrap

    def put_back() -> None:
        torch.nn.functional.linear = linear

    return put_back


def _check_device(device: torch.device) -> None:
    found = deepspeed_module("deepspeed.accelerator").get_accelerator().device_name()
    if found != device.type:
        raise RunError(
            f"this run is on {device.type!r}, and DeepSpeed was imported for {found!r} (it decides "
            f"once for a process): start Python with DS_ACCELERATOR={device.type}, or choose "
            f"accelerator={found!r}"
        )


def _set_log_level(level: int) -> None:
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(level)
    for handler in logger.handlers:  # each has a level of its own, which is that of warnings
        handler.setLevel(level)


def _hide_deprecations() -> None:
    """Do not show what torch announces about collectives that DeepSpeed calls in every step."""
    warnings.filterwarnings("ignore", _DEPRECATED, FutureWarning)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable meanwhile, unless it is set."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _forget_old_groups() -> None:
    """Drop what DeepSpeed keeps of a process group that was destroyed since."""
    groups = deepspeed_module("deepspeed.utils.groups")
    if groups._WORLD_GROUP is None:
        return
    if groups._WORLD_GROUP not in dist.distributed_c10d._world.pg_map:
        groups._release_process_group_references()


def _forget_autocast() -> None:
    """Drop that an engine before computed under autocast: every later one would take it over."""
    autocast: Any = deepspeed_module("deepspeed.runtime.torch_autocast")
    autocast.TORCH_AUTOCAST_INITIALIZED, autocast.TORCH_AUTOCAST_DTYPE = False, None


def _agree_on_numbers(env: Env) -> None:
    """Let all ranks go on counting from one number.

    DeepSpeed numbers parameters and modules of stage 3 as each process meets them, and ends the run
    when the numbers differ between ranks: as soon as one of them has had another model before.
    """
    parameters = deepspeed_module("deepspeed.runtime.zero.partition_parameters").Init
    modules = deepspeed_module("deepspeed.runtime.zero.parameter_offload").DeepSpeedZeRoOffload
    (count,) = modules._register_deepspeed_module.__defaults__
    numbers = torch.tensor([parameters.param_id, count[0]], device=env.device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=env.group)
    parameters.param_id, count[0] = numbers.tolist()
