"""A GPT with several blocks and tied embeddings; 40 tensors with three of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, CONTEXT = 97, 16


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, context, width = hidden.shape
        heads = (batch, context, 4, width // 4)
        parts = self.qkv(self.ln1(hidden)).chunk(3, dim=-1)
        query, key, value = (part.view(heads).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.proj(mixed.transpose(1, 2).reshape(batch, context, width))
        return hidden + cast(Tensor, self.down(F.gelu(self.up(self.ln2(hidden)))))


class Gpt(nn.Module):
    """Tokens ``(batch, context)`` to logits ``(batch, vocabulary, context)``."""

    def __init__(self, width: int = 36, depth: int = 3, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.h = nn.ModuleList(Block(width) for _ in range(depth))
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            hidden = block(hidden)
        return cast(Tensor, self.head(self.ln(hidden))).transpose(1, 2)


class LateGpt(Gpt):
    """The same, with all weights drawn again at the end of the constructor, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.apply(_draw)


def _draw(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        module.weight.data.normal_(0.0, 0.02)


wide_gpt: Callable[[], nn.Module] = partial(Gpt, width=256, depth=6, vocabulary=2048)
"""5.3 million parameters."""


def text(batch: int, seed: int = 0, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    """Tokens, and the same shifted by one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (batch, CONTEXT + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
