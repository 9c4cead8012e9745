"""The language model of ``examples/gpt.py`` in plain PyTorch, shared out by FSDP2."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.utils.data import DataLoader, DistributedSampler

from examples.gpt import ACCUMULATE, BATCH, GPT, load_data, nats_per_byte, warmup_cosine

steps = int(sys.argv[1])
dist.init_process_group("gloo")
world_size = dist.get_world_size()
torch.manual_seed(1)
train, val = load_data()
model: Any = GPT()
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
# gloo of torch 2.7 sums where FSDP2 asks for the mean, silently.
mean = torch.empty(1)
dist.reduce_scatter_tensor(mean, torch.ones(world_size), dist.ReduceOp.AVG)
if mean > 1:
    for module in (*model.blocks, model):
        module.set_all_reduce_hook(lambda gradient: gradient.div_(world_size))
sampler: DistributedSampler[Any] = DistributedSampler(train, seed=1)
batches = iter(DataLoader(train, BATCH // ACCUMULATE // world_size, sampler=sampler))
groups: list[dict[str, Any]] = [
    {"params": [p for p in model.parameters() if p.ndim > 1]},
    {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
]
optimizer = AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
scheduler = warmup_cosine(optimizer, steps)

for _ in range(steps):
    for micro in range(ACCUMULATE):
        model.set_requires_gradient_sync(micro == ACCUMULATE - 1)
        inputs, targets = next(batches)
        (nats_per_byte(model(inputs), targets) / ACCUMULATE).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()

loader = DataLoader(val, 8, sampler=DistributedSampler(val, shuffle=False))
with torch.no_grad():
    losses = [nats_per_byte(model(inputs), targets) for inputs, targets in loader]
loss = torch.stack(losses).mean()
dist.all_reduce(loss)
weights, state = get_state_dict(model, optimizer)
dcp.save({"model": weights, "optimizer": state}, checkpoint_id="checkpoint")
if dist.get_rank() == 0:
    print(f"validation: {loss.item() / world_size / math.log(2):.4f} bits per byte")
dist.destroy_process_group()
