"""The language model of ``examples/gpt.py`` with Lightning, shared out by FSDP2."""

from __future__ import annotations

import math
import sys
from typing import Any

import lightning
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import AdamW
from torch.utils.data import DataLoader

from examples.gpt import ACCUMULATE, BATCH, GPT, load_data, nats_per_byte, warmup_cosine


class Module(lightning.LightningModule):
    """Model, losses and optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT()

    def configure_model(self) -> None:
        """Share the model out; called again by ``validate``."""
        if not isinstance(self.model, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: list[Any], batch_idx: int) -> Any:
        """The loss of a micro-batch."""
        return nats_per_byte(self.model(batch[0]), batch[1])

    def validation_step(self, batch: list[Any], batch_idx: int) -> None:
        """Log the loss."""
        self.log("loss", nats_per_byte(self.model(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and its schedule."""
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters() if p.ndim > 1]},
            {"params": [p for p in self.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
        scheduler = warmup_cosine(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


steps = int(sys.argv[1])
lightning.seed_everything(1)
train, val = load_data()
module = Module()
trainer = lightning.Trainer(
    # By default the ranks would form one tensor-parallel group and all train on the same data.
    strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    accelerator="cpu",
    devices=2,
    max_steps=steps,
    accumulate_grad_batches=ACCUMULATE,
    gradient_clip_val=1.0,
)
trainer.fit(module, DataLoader(train, BATCH // ACCUMULATE // 2, shuffle=True))
[metrics] = trainer.validate(module, DataLoader(val, 8))
trainer.save_checkpoint("checkpoint.ckpt")
if trainer.is_global_zero:
    print(f"validation: {metrics['loss'] / math.log(2):.4f} bits per byte")
