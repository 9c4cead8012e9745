"""Train a small GPT on the source text of Python's standard library; the strategy is one word.

One process; several that hold the whole model each; several that share it out::

    python examples/gpt.py
    torchrun --nproc-per-node 2 examples/gpt.py --strategy ddp
    torchrun --nproc-per-node 2 examples/gpt.py --strategy fsdp

It lets the model write a little, and prints how many bits it needs for a byte it has not seen: 8
before training. Stopped on the way, it goes on with ``--resume``, under any strategy.
"""

from __future__ import annotations

import argparse
import math
import os
import sysconfig
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from torchweld import ModelCheckpoint, Trainer, use
from torchweld.interfaces import Run

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


def decay(_name: str, _module: nn.Module, parameter: nn.Parameter) -> Mapping[str, object]:
    """No weight decay for norms and biases."""
    return {} if parameter.ndim > 1 else {"weight_decay": 0.0}


def warmup_cosine(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Up in the first tenth of the run, then down to a tenth of the learning rate."""

    def factor(step: int) -> float:
        falling = 0.55 + 0.45 * math.cos(math.pi * step / total_steps)
        return min(10 * (step + 1) / total_steps, falling)

    return LambdaLR(optimizer, factor)


def continue_text(run: Run, tokens: Tensor) -> tuple[Tensor, None]:
    """Draw 100 bytes, each after all that came before it."""
    for _ in range(100):
        logits = run.model(tokens[:, -CONTEXT:])[:, -1]
        drawn = torch.multinomial(logits.div(0.7).softmax(dim=-1), 1)
        tokens = torch.cat([tokens, drawn], dim=1)
    return tokens, None


def make_trainer(
    strategy: str, steps: int, root: Path, *, clip: float | None = 1.0, backend: str | None = None
) -> Trainer:
    """The same training under any strategy, on any number of processes."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return Trainer(
        strategy=strategy,
        data=use("torch", batch_size=BATCH // ACCUMULATE // world_size),
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=clip,
        compile={"backend": backend} if backend else False,
        max_steps=steps,
        val_check_interval=500,
        default_root_dir=root,
        callbacks=ModelCheckpoint(every_n_train_steps=500),
        seed=1,
    )


def fit(trainer: Trainer, train: Windows, val: Windows, *, ckpt_path: str | None = None) -> None:
    """Train, from the start or from a checkpoint."""
    trainer.fit(
        GPT,  # called after seeding, so that every run starts alike
        train,
        val,
        loss=nats_per_byte,
        optimizer=partial(AdamW, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
        param_groups=decay,
        lr_scheduler=warmup_cosine,
        ckpt_path=ckpt_path,
    )


def main() -> None:
    """Plan, train, evaluate, write a little."""
    parser = argparse.ArgumentParser(description="a language model with torchweld")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in root")
    parser.add_argument("--compile", metavar="BACKEND", help="of torch.compile, e.g. inductor")
    options = parser.parse_args()
    say = print if os.environ.get("RANK", "0") == "0" else lambda *_: None
    train, val = load_data()

    trainer = make_trainer(options.strategy, options.steps, options.root, backend=options.compile)
    say(trainer.plan.explain())
    fit(trainer, train, val, ckpt_path="last" if options.resume else None)
    loss = trainer.evaluate(data=val)["loss"]
    for text in trainer.predict(data=[torch.tensor(list(b"def "))], eval_step=continue_text):
        say(bytes(text[0].tolist()).decode(errors="replace"))
    trainer.export("gpt.safetensors")
    say(f"validation: {loss / math.log(2):.4f} bits per byte")


if __name__ == "__main__":
    main()
