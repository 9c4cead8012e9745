"""Small models and data for the conformance suites, the same in every process.

Sizes are odd on purpose: nothing divides by a number of processes, so padding shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_CLASSES = 7
IMAGE_SHAPE = (3, 9, 9)
NUM_FEATURES = 33
VOCABULARY, CONTEXT = 29, 6


def mlp() -> nn.Module:
    """33 -> 65 -> 7."""
    return nn.Sequential(nn.Linear(NUM_FEATURES, 65), nn.Tanh(), nn.Linear(65, NUM_CLASSES))


def frozen_mlp() -> nn.Module:
    """An MLP whose first layer and last bias are frozen."""
    model = nn.Sequential(
        nn.Linear(NUM_FEATURES, 65), nn.Tanh(), nn.Linear(65, 17), nn.Tanh(), nn.Linear(17, 7)
    )
    for parameter in (*model[0].parameters(), model[4].bias):
        parameter.requires_grad_(False)
    return model


def convnet() -> nn.Module:
    """Two convolutions without normalisation; ``(batch, 3, 9, 9)`` -> 7."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(5, 9, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, NUM_CLASSES),
    )


def batchnorm_convnet() -> nn.Module:
    """A strided convolution of 16 channels, BatchNorm, max pooling, dropout: something for all."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16, NUM_CLASSES),
    )


class Branching(nn.Module):
    """A net whose side branch takes part only when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(NUM_FEATURES, 65)
        self.side = nn.Linear(65, 65)
        self.head = nn.Linear(65, NUM_CLASSES)

    def forward(self, inputs: Tensor, *, branch: bool = True) -> Tensor:
        hidden = torch.tanh(self.trunk(inputs))
        if branch:
            hidden = hidden + torch.tanh(self.side(hidden))
        return cast(Tensor, self.head(hidden))


class TinyGpt(nn.Module):
    """One attention block; the output layer is the embedding (tied)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """``(batch, context)`` int64 -> ``(batch, vocabulary, context)`` logits."""
        hidden = self.wte(tokens)
        query, key, value = self.qkv(self.norm(hidden)).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        logits: Tensor = self.head(hidden + self.proj(attended))
        return logits.transpose(1, 2)


@dataclass(frozen=True)
class Inner:
    """A dataclass inside the outputs of :class:`Nested`."""

    hidden: Tensor
    argmax: Tensor


class Nested(nn.Module):
    """Returns a mapping with a dataclass and a tuple in it.

    Attributes:
        seen: dtype of the hidden layer in the last forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_FEATURES, 17)
        self.last = nn.Linear(17, NUM_CLASSES)
        self.seen: torch.dtype | None = None

    def forward(self, inputs: Tensor) -> Mapping[str, Any]:
        hidden = self.first(inputs)
        self.seen = hidden.dtype
        logits = self.last(torch.tanh(hidden))
        return {"logits": logits, "inner": Inner(hidden, logits.argmax(1)), "pair": (hidden, "x")}


def features(num_samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``(n, 33)`` floats and class indices."""
    return _classified((num_samples, NUM_FEATURES), seed)


def images(num_samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``(n, 3, 9, 9)`` floats and class indices."""
    return _classified((num_samples, *IMAGE_SHAPE), seed)


def tokens(num_samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``(n, 6)`` token indices, and the same shifted by one."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(VOCABULARY, (num_samples, CONTEXT + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def _classified(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(shape, generator=generator)
    return inputs, torch.randint(NUM_CLASSES, shape[:1], generator=generator)
