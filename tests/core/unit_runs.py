"""A small language model, trained with and without compiled or checkpointed units."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from torchweld import Trainer, use

VOCABULARY, CONTEXT, WIDTH = 31, 8, 16


class Block(nn.Module):
    """Attention and a feed-forward part with dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, WIDTH)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Residual."""
        query, key, value = self.qkv(self.norm(hidden)).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.proj(mixed)
        return hidden + self.mlp(hidden)  # type: ignore[no-any-return]  # a tensor


class Gpt(nn.Module):
    """Three blocks and tied embeddings."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.h = nn.ModuleList(Block(dropout) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, vocabulary, context)``."""
        hidden = self.wte(tokens)
        for block in self.h:
            hidden = block(hidden)
        return self.head(hidden).transpose(1, 2)  # type: ignore[no-any-return]  # a tensor


def make_text(samples: int = 22) -> TensorDataset:
    """Tokens and the ones after them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (samples, CONTEXT + 1), generator=generator)
    return TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class Counting:
    """A backend that counts graphs and changes no bit."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: Any, inputs: Any) -> Any:
        self.graphs += 1
        return aot_eager(module, inputs)


def trainer_of(strategy: Any, **settings: Any) -> Trainer:
    """Two epochs of uneven batches, nothing written."""
    given = {"max_epochs": 2, "seed": 3, "barebones": True, "data": use("torch", batch_size=4)}
    return Trainer(strategy=strategy, **{**given, **settings})


def train(
    strategy: Any,
    *,
    own_loop: bool = False,
    ckpt_path: Any = None,
    dropout: float = 0.2,
    validates: bool = True,
    **settings: Any,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train the model; its exported weights, and its losses."""
    torch.manual_seed(0)
    model, data = Gpt(dropout), make_text()
    trainer = trainer_of(strategy, **settings)
    arguments: dict[str, Any] = {
        "val": data if validates else None,
        "loss": F.cross_entropy,
        "optimizer": functools.partial(AdamW, lr=1e-2, eps=1e-4),
        "ckpt_path": ckpt_path,
    }
    if own_loop:
        with trainer.prepare(model, data, **arguments) as run:
            for inputs, targets in run.batches():
                run.backward(run.loss(run.model(inputs), targets))
                run.step()
            metrics = dict(run.borders.metrics)
    else:
        metrics = dict(trainer.fit(model, data, **arguments).metrics)
    return exported(trainer), {name: v for name, v in metrics.items() if "loss" in name}


def exported(trainer: Trainer) -> dict[str, Tensor]:
    """The weights as ``export`` writes them, on every rank."""
    from safetensors.torch import load_file

    return load_file(trainer.export(Path("exported.safetensors")))


def different(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names that are not bitwise equal, or on one side only."""
    both = left.keys() & right.keys()
    return sorted(
        (left.keys() ^ right.keys()) | {n for n in both if not torch.equal(left[n], right[n])}
    )


def compare(strategy: Any, settings: dict[str, Any], improved: list[dict[str, Any]]) -> list[Any]:
    """Names of weights and metrics that differ from the plain run's, and graphs, for each."""
    plain, plain_metrics = train(strategy, **settings)
    found = []
    for one in improved:
        torch._dynamo.reset()
        counting = Counting()
        backend = {"compile": {"backend": counting}} if "compile" in one else {}
        weights, metrics = train(strategy, **settings, **{**one, **backend})
        changed = {k: (v, plain_metrics[k]) for k, v in metrics.items() if v != plain_metrics[k]}
        found.append((different(plain, weights), changed, counting.graphs))
    return found
