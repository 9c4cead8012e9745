"""What a run changes for the whole process: put back when it ends, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torchweld.components import Settings

RECOMPILE_LIMIT = 64
"""Graphs of one ``forward``: 16 units that are not alike, each in training and in evaluation, with
whole and with short batches. At torch's 8 the rest of them would run uncompiled."""

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def surroundings(settings: Settings) -> Iterator[None]:
    """Apply what ``settings`` ask of the whole process; with everything off, nothing."""
    with ExitStack() as stack:
        if settings.deterministic:
            stack.enter_context(deterministic(settings.deterministic))
        if settings.compile is not None:
            checkpoints = settings.activation_checkpointing is not None
            stack.enter_context(compiling(checkpoints=checkpoints))
        yield


@contextmanager
def deterministic(mode: Literal[True, "warn"]) -> Iterator[None]:
    """Let torch choose deterministic algorithms; ``"warn"``: where there is one."""
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark
    workspace = os.environ.get(_CUBLAS)
    torch.use_deterministic_algorithms(True, warn_only=mode == "warn")
    cudnn.deterministic, cudnn.benchmark = True, False
    os.environ.setdefault(_CUBLAS, ":4096:8")  # cuBLAS refuses to be deterministic without it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        cudnn.deterministic, cudnn.benchmark = flags
        if workspace is None:
            os.environ.pop(_CUBLAS, None)


@contextmanager
def compiling(*, checkpoints: bool) -> Iterator[None]:
    """Let dynamo compile as many variants as a model has."""
    from torch._dynamo import config

    limit = recompile_limit()
    changes = {limit: max(RECOMPILE_LIMIT, getattr(config, limit))}
    if checkpoints:
        # DDP's optimizer of graphs refuses those with checkpointed regions; units are small enough.
        changes["optimize_ddp"] = False
    with config.patch(changes):
        yield


def recompile_limit() -> str:
    """The setting of dynamo's that limits the graphs of one ``forward``; torch 2.7 renamed it."""
    from torch._dynamo import config

    return "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"


@contextmanager
def uncompiled(settings: Settings) -> Iterator[None]:
    """Run what is compiled as it is written: a trial without gradients needs no graph."""
    if settings.compile is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
