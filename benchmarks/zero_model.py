"""The GPT of ``benchmarks.zero``, its tokens, and the clock that is in them."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

CONTEXT, VOCABULARY, HEADS = 64, 256, 4
WARMUP = 10  # steps before anything is measured
COUNTED = 20  # steps after it whose Python calls are counted, not timed


@dataclass(frozen=True)
class Setup:
    """What is trained, by every contestant alike.

    Attributes:
        stage: of ZeRO.
        steps: that are timed.
    """

    stage: int
    steps: int
    width: int
    depth: int
    batch_size: int
    precision: str


@dataclass
class Measured:
    """What the steps of one process took.

    Attributes:
        calls: Python calls a step.
        seconds: a step.
        samples_per_second: of all processes.
        peak_bytes: on the device; 0 without CUDA.
    """

    calls: float = 0.0
    seconds: float = 0.0
    samples_per_second: float = 0.0
    peak_bytes: int = 0


# ---- the model and its clock ---------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(batch, context, width)`` to the same shape."""
        batch, context, width = hidden.shape
        parts = self.qkv(self.ln1(hidden)).chunk(3, dim=-1)
        heads = (batch, context, HEADS, width // HEADS)
        query, key, value = (part.view(heads).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.proj(mixed.transpose(1, 2).reshape(batch, context, width))
        return hidden + cast("Tensor", self.down(F.gelu(self.up(self.ln2(hidden)))))


class Gpt(nn.Module):
    """Tokens ``(batch, context)`` to logits ``(batch, vocabulary, context)``."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.h = nn.ModuleList(Block(width) for _ in range(depth))
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """One prediction a token."""
        hidden = self.wte(tokens) + self.wpe.weight
        for block in self.h:
            hidden = block(hidden)
        return cast("Tensor", self.head(self.ln(hidden))).transpose(1, 2)


class Tokens(Dataset[tuple[Tensor, Tensor]]):
    """Random tokens, a batch at a time; the clock runs from one fetch to another."""

    def __init__(self, setup: Setup, world_size: int) -> None:
        self.setup, self.world_size, self.measured = setup, world_size, Measured()
        self.fetches = self.calls = 0
        size = (WARMUP + COUNTED + setup.steps + 2) * setup.batch_size * world_size
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(VOCABULARY, (size, CONTEXT + 1), generator=generator)

    def __len__(self) -> int:
        """The number of windows."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One window, for whoever looks at the first."""
        return self.tokens[index, :-1], self.tokens[index, 1:]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch."""
        self.fetches += 1
        if self.fetches == WARMUP:
            sys.setprofile(self._count)
        elif self.fetches == WARMUP + COUNTED:
            self._start()
        elif self.fetches == WARMUP + COUNTED + self.setup.steps:
            self._stop()
        batch = self.tokens[indices]
        return batch[:, :-1], batch[:, 1:]

    def _start(self) -> None:
        sys.setprofile(None)
        _wait_for_device()
        self.measured.seconds = -time.perf_counter()

    def _stop(self) -> None:
        _wait_for_device()
        seconds = (self.measured.seconds + time.perf_counter()) / self.setup.steps
        samples = self.setup.batch_size * self.world_size / seconds
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        self.measured = Measured(self.calls / COUNTED, seconds, samples, peak)

    def _count(self, _frame: FrameType, event: str, _argument: object) -> None:
        self.calls += event == "call"


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def as_is(batch: Any) -> Any:
    """Collate nothing: ``Tokens`` gives whole batches."""
    return batch


def make_model(setup: Setup) -> Gpt:
    """The same weights in every process."""
    torch.manual_seed(0)
    return Gpt(setup.width, setup.depth)
