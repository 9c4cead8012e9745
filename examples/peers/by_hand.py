"""The language model of ``examples/gpt.py`` in plain PyTorch, in one process."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from examples.gpt import ACCUMULATE, BATCH, GPT, load_data, nats_per_byte, warmup_cosine

steps = int(sys.argv[1])
torch.manual_seed(1)
train, val = load_data()
model: Any = GPT()
batches = iter(DataLoader(train, BATCH // ACCUMULATE, shuffle=True))
groups: list[dict[str, Any]] = [
    {"params": [p for p in model.parameters() if p.ndim > 1]},
    {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
]
optimizer = AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
scheduler = warmup_cosine(optimizer, steps)

for _ in range(steps):
    for _ in range(ACCUMULATE):
        inputs, targets = next(batches)
        (nats_per_byte(model(inputs), targets) / ACCUMULATE).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()

with torch.no_grad():
    losses = [nats_per_byte(model(inputs), targets) for inputs, targets in DataLoader(val, 8)]
loss = torch.stack(losses).mean()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "checkpoint.pt")
print(f"validation: {loss.item() / math.log(2):.4f} bits per byte")
