"""The language model of ``examples/gpt.py`` with Accelerate, shared out by FSDP2."""

from __future__ import annotations

import math
import sys
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import set_seed
from torch.optim import AdamW
from torch.utils.data import DataLoader

from examples.gpt import ACCUMULATE, BATCH, GPT, load_data, nats_per_byte, warmup_cosine

steps = int(sys.argv[1])
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2,
    auto_wrap_policy="transformer_based_wrap",
    transformer_cls_names_to_wrap=["Block"],
)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE, fsdp_plugin=plugin)
set_seed(1)
train, val = load_data()
model = GPT()
loader = DataLoader(train, BATCH // ACCUMULATE // accelerator.num_processes, shuffle=True)
groups: list[dict[str, Any]] = [
    {"params": [p for p in model.parameters() if p.ndim > 1]},
    {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
]
optimizer = AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
# A prepared schedule takes as many steps at once as there are processes.
scheduler = warmup_cosine(optimizer, steps * accelerator.num_processes)
model, optimizer, scheduler, loader, val_loader = accelerator.prepare(
    model, optimizer, scheduler, loader, DataLoader(val, 8)
)

for inputs, targets in islice(loader, steps * ACCUMULATE):
    with accelerator.accumulate(model):
        accelerator.backward(nats_per_byte(model(inputs), targets))
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

with torch.no_grad():
    losses = [nats_per_byte(model(inputs), targets) for inputs, targets in val_loader]
loss = accelerator.reduce(torch.stack(losses).mean(), "mean")
accelerator.save_state("checkpoint")
accelerator.print(accelerator.distributed_type)
accelerator.print(f"validation: {loss.item() / math.log(2):.4f} bits per byte")
