"""What a step under ``deepspeed`` costs beside DeepSpeed's own engine, driven by hand.

Every contestant trains the same GPT on the same tokens in processes of its own, because a ZeRO-3
engine is never freed. The dataset is the clock: Python calls are counted, and then time is taken,
between two of its fetches, after a warm-up. On CPUs the Python calls are what to look at; where
CUDA is found the same command measures throughput and the memory held on the device.

    python -m benchmarks.zero [--stages 1 2 3] [--processes 2] [--steps 40] [--rounds 3]
    python -m benchmarks.zero --width 1024 --depth 12 --batch-size 8 --precision bf16   # on GPUs
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from socket import socket
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing import (
    ProcessContext,
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)
from torch.optim import AdamW
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.zero_model import Measured, Setup, Tokens, as_is, make_model

CLIP = 1.0
ADAMW = partial(AdamW, lr=1e-3)
SECONDS = 1800.0
PACKAGES = ["torchweld", "torchweld-deepspeed", "deepspeed", "torch", "lightning"]


# ---- contestants ---------------------------------------------------------------------------------


def engine_by_hand(setup: Setup, data: Tokens, config: dict[str, Any]) -> None:
    """DeepSpeed's engine as its own documentation drives it, told the same as ours is."""
    from torchweld_deepspeed.imports import deepspeed_module

    device = _device()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = make_model(setup).to(device)
    optimizer = ADAMW(model.parameters())
    engine, *_ = deepspeed_module().initialize(model=model, optimizer=optimizer, config=config)
    if setup.precision == "bf16-true":
        engine.bfloat16()
    for tokens, targets in _sharded(data, setup):
        loss = F.cross_entropy(engine(tokens.to(device)).float(), targets.to(device))
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
    dist.destroy_process_group()


def _sharded(data: Tokens, setup: Setup) -> Iterator[tuple[Tensor, Tensor]]:
    sampler: DistributedSampler[Any] = DistributedSampler(data)
    loader = DataLoader(data, setup.batch_size, sampler=sampler, collate_fn=as_is)
    return iter(loader)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _trainer(setup: Setup, folder: Path, *, barebones: bool) -> Any:
    from torchweld import Trainer, use

    return Trainer(
        strategy=use("deepspeed", stage=setup.stage),
        precision=setup.precision,
        gradient_clip_val=CLIP,
        max_epochs=1,
        barebones=barebones,
        default_root_dir=folder,
    )


def torchweld_fit(setup: Setup, data: Tokens, _config: dict[str, Any], *, barebones: bool) -> None:
    """``Trainer.fit``."""
    loader = DataLoader(data, setup.batch_size, shuffle=True, collate_fn=as_is)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(setup, Path(folder), barebones=barebones)
        trainer.fit(make_model(setup), loader, loss=F.cross_entropy, optimizer=ADAMW)


def torchweld_own_loop(setup: Setup, data: Tokens, _config: dict[str, Any]) -> None:
    """``Trainer.prepare``."""
    loader = DataLoader(data, setup.batch_size, shuffle=True, collate_fn=as_is)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(setup, Path(folder), barebones=True)
        given: dict[str, Any] = {"loss": F.cross_entropy, "optimizer": ADAMW}
        with trainer.prepare(make_model(setup), loader, **given) as run:
            for tokens, targets in run.batches():
                run.backward(run.loss(run.model(tokens), targets))
                run.step()


def lightning(setup: Setup, data: Tokens, config: dict[str, Any]) -> None:
    """Lightning's Trainer over its own DeepSpeedStrategy, with everything else off."""
    import lightning as pl
    from lightning.pytorch.strategies import DeepSpeedStrategy

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model(setup)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]).float(), batch[1])

        def configure_optimizers(self) -> AdamW:
            return ADAMW(self.parameters())

    told = {k: v for k, v in config.items() if k != "managed_gradient_accumulation"}
    trainer = pl.Trainer(
        accelerator="cuda",  # its strategy refuses everything else
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=DeepSpeedStrategy(config=told),
        max_epochs=1,
        barebones=True,
    )
    loader = DataLoader(data, setup.batch_size, shuffle=True, collate_fn=as_is)
    trainer.fit(Module(), loader)


CONTESTANTS: dict[str, Callable[[Setup, Tokens, dict[str, Any]], None]] = {
    "DeepSpeed's engine, by hand": engine_by_hand,
    "torchweld fit, extras on (the default)": partial(torchweld_fit, barebones=False),
    "torchweld fit, barebones": partial(torchweld_fit, barebones=True),
    "torchweld own loop": torchweld_own_loop,
    "Lightning, barebones": lightning,
}
NEED_CUDA = {"Lightning, barebones"}  # its strategy refuses everything else


# ---- one process ---------------------------------------------------------------------------------


def engine_config(setup: Setup) -> dict[str, Any]:
    """What our strategy tells the engine, so that both are told the same."""
    from torchweld.components import Settings
    from torchweld.interfaces import Env
    from torchweld_deepspeed.config import fit_buckets, make_config
    from torchweld_deepspeed.options import DeepSpeedOptions

    settings = Settings(precision=cast("Any", setup.precision), gradient_clip_val=CLIP)
    options = DeepSpeedOptions(stage=cast("Any", setup.stage))
    config = make_config(options, settings, Env(0, 1, 0, _device()))
    fit_buckets(config, sum(parameter.numel() for parameter in make_model(setup).parameters()))
    return config


def measure(rank: int, processes: int, port: int, name: str, setup: Setup, result: Path) -> None:
    """Run one contestant in this process; rank 0 writes what it measured."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)  # an exception is handed on by the launcher
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    data = Tokens(setup, processes)
    CONTESTANTS[name](setup, data, engine_config(setup))
    if rank == 0:
        result.write_text(json.dumps(asdict(data.measured)), encoding="utf-8")


# ---- all of them ---------------------------------------------------------------------------------


def launch(name: str, setup: Setup, processes: int) -> Measured | None:
    """Run one contestant in processes of its own; None, and the reason shown, where it fails.

    On CPUs they are forked from one process that has imported everything, which saves most of the
    time of a run.
    """
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    with tempfile.TemporaryDirectory() as folder, socket() as free:
        result = Path(folder) / "result.json"
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        job = (processes, port, name, setup, result)
        ranks = start_processes(measure, job, processes, join=False, start_method=method)
        try:
            _wait_for(ranks)
            return Measured(**json.loads(result.read_text(encoding="utf-8")))
        except (ProcessExitedException, ProcessRaisedException, OSError) as error:
            reason = [line for line in str(error).splitlines() if "Error" in line] or ["no result"]
            print(f"left out: {name} ({reason[-1].strip()})", file=sys.stderr)
            return None


def _wait_for(ranks: ProcessContext) -> None:
    deadline = time.monotonic() + SECONDS
    while not ranks.join(timeout=deadline - time.monotonic()):
        if time.monotonic() >= deadline:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"TimeoutError: not done in {SECONDS:.0f} s")


def prepare() -> None:
    """Say once, for all processes to come, what they find in place."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    multiprocessing.set_forkserver_preload(["torchweld_deepspeed.strategy", "deepspeed"])


def compare(setup: Setup, processes: int, rounds: int, names: Sequence[str]) -> list[str]:
    """Rows of the table for one stage, from interleaved rounds."""
    found: dict[str, list[Measured]] = {name: [] for name in names}
    for number in range(rounds):
        at = number % len(names)
        for name in [*names[at:], *names[:at]]:
            measured = launch(name, setup, processes)
            found[name] += [measured] if measured else []
    bare = found[names[0]][0].calls if found[names[0]] else None
    return [_row(setup, name, bare, found[name]) for name in names if found[name]]


def _row(setup: Setup, name: str, bare: float | None, times: list[Measured]) -> str:
    calls = times[0].calls
    above = f"{calls - bare:+.1f}" if bare is not None else "-"
    seconds = statistics.median(one.seconds for one in times)
    best = min(one.seconds for one in times)
    rate = max(one.samples_per_second for one in times)
    peak = max(one.peak_bytes for one in times)
    memory = f"{peak / 2**20:.0f}" if peak else "-"
    return (
        f"| {setup.stage} | {name} | {calls:.1f} | {above} "
        f"| {1e3 * seconds:.2f} ({1e3 * best:.2f}) | {rate:.0f} | {memory} |"
    )


def version_of(package: str) -> str:
    """The package and its version, or that it is missing."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is not installed"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What a step under deepspeed costs.")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4, help="windows a process")
    parser.add_argument("--precision", default="32")
    parser.add_argument("--only", default="", help="contestants with this word in their name")
    options = parser.parse_args()
    prepare()
    names = [name for name in CONTESTANTS if options.only in name or "by hand" in name]
    if not torch.cuda.is_available():
        names = [name for name in names if name not in NEED_CUDA]
    print("| stage | loop | calls | above by hand | ms (fastest) | samples/s | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for stage in options.stages:
        shape = (options.width, options.depth, options.batch_size, options.precision)
        setup = Setup(stage, options.steps, *shape)
        for row in compare(setup, options.processes, options.rounds, names):
            print(row, flush=True)
    print(f"\n{', '.join(map(version_of, PACKAGES))}; {options.processes} processes")


if __name__ == "__main__":
    main()
