"""Train a small GPT on the source text of Python's standard library, in plain PyTorch.

In one process, or in several that hold the whole model each::

    python examples/plain/gpt.py
    torchrun --nproc-per-node 2 examples/plain/gpt.py

It lets the model write a little, and prints how many bits it needs for a byte it has not seen: 8
before training. Stopped on the way, it goes on with ``--resume``.
"""

from __future__ import annotations

import argparse
import math
import os
import sysconfig
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset, DistributedSampler

CONTEXT = 128  # bytes that the model sees
BATCH = 16  # windows a step, over all micro-batches and processes
ACCUMULATE = 2  # micro-batches a step


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Every window of a text once; the targets are the same bytes, one further."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __len__(self) -> int:
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.text[index * CONTEXT : (index + 1) * CONTEXT + 1].long()
        return window[:-1], window[1:]


def load_data() -> tuple[Windows, Windows]:
    """The modules of the standard library as one text; its last 512 windows are for validation."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = bytearray(b"".join(path.read_bytes() for path in sources))
    train, val = torch.frombuffer(text, dtype=torch.uint8).tensor_split([-(512 * CONTEXT + 1)])
    return Windows(train), Windows(val)


class Block(nn.Module):
    """Causal self-attention, then two linear layers, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, time, width)``, in and out."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return torch.add(x, self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", over bytes."""

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        self.head.weight = self.tokens.weight  # bytes are read and written with the same vectors
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes ``(batch, time)`` to logits ``(batch, time, 256)``."""
        x: Tensor = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]  # torch hints Any


def nats_per_byte(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over all bytes: windows are equally long, so it is the mean over them too."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def rate(step: int, total_steps: int) -> float:
    """Up in the first tenth of the run, then down to a tenth of the learning rate."""
    falling = 0.55 + 0.45 * math.cos(math.pi * step / total_steps)
    return 3e-3 * min(10 * (step + 1) / total_steps, falling)


def make_optimizer(model: nn.Module) -> AdamW:
    """No weight decay for norms and biases."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)


@torch.no_grad()
def continue_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Draw 100 bytes, each after all that came before it."""
    for _ in range(100):
        logits = model(tokens[:, -CONTEXT:])[:, -1]
        drawn = torch.multinomial(logits.div(0.7).softmax(dim=-1), 1)
        tokens = torch.cat([tokens, drawn], dim=1)
    return tokens


@torch.no_grad()
def evaluate(model: nn.Module, val: Windows, rank: int, world_size: int) -> float:
    """The loss over all windows, shared out over the processes."""
    sampler: DistributedSampler[Any] = DistributedSampler(val, world_size, rank, shuffle=False)
    loader = DataLoader(val, BATCH // ACCUMULATE // world_size, sampler=sampler)
    losses = [nats_per_byte(model(inputs), targets) for inputs, targets in loader]
    loss = torch.stack(losses).mean()
    if world_size > 1:
        dist.all_reduce(loss)
    return loss.item() / world_size


def train_steps(
    model: nn.Module, wrapped: Any, train: Windows, options: argparse.Namespace, rank: int
) -> None:
    """Train, from the start or from a checkpoint."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    optimizer = make_optimizer(model)
    done = 0
    if options.resume:
        saved = torch.load("checkpoint.pt")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    sampler: DistributedSampler[Any] = DistributedSampler(train, world_size, rank, seed=1)
    loader = DataLoader(train, BATCH // ACCUMULATE // world_size, sampler=sampler)
    batches = islice(loader, done * ACCUMULATE, None)

    for step in range(done, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, options.steps)
        for micro in range(ACCUMULATE):
            inputs, targets = next(batches)
            waits = world_size > 1 and micro < ACCUMULATE - 1
            with wrapped.no_sync() if waits else nullcontext():
                (nats_per_byte(wrapped(inputs), targets) / ACCUMULATE).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % options.save_every == 0 and rank == 0:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**saved, "step": step + 1}, "checkpoint.pt")


def main() -> None:
    """Train, evaluate, write a little."""
    parser = argparse.ArgumentParser(description="a language model in plain PyTorch")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--resume", action="store_true", help="from checkpoint.pt")
    parser.add_argument("--compile", metavar="BACKEND", help="of torch.compile, e.g. inductor")
    options = parser.parse_args()
    rank, world_size = (int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    train, val = load_data()

    torch.manual_seed(1 + rank)
    model = GPT()
    wrapped: Any = torch.compile(model, backend=options.compile) if options.compile else model
    if world_size > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        wrapped = DistributedDataParallel(wrapped)
    train_steps(model, wrapped, train, options, rank)

    model.eval()
    loss = evaluate(model, val, rank, world_size)
    if rank == 0:
        text = continue_text(model, torch.tensor([list(b"def ")]))
        print(bytes(text[0].tolist()).decode(errors="replace"))
        save_file(dict(model.named_parameters()), "gpt.safetensors")  # tied weights once
        print(f"validation: {loss / math.log(2):.4f} bits per byte")


if __name__ == "__main__":
    main()
