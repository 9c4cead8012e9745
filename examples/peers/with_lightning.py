"""The language model of ``examples/gpt.py`` with Lightning, in one process."""

from __future__ import annotations

import math
import sys
from typing import Any

import lightning
from torch.optim import AdamW
from torch.utils.data import DataLoader

from examples.gpt import ACCUMULATE, BATCH, GPT, load_data, nats_per_byte, warmup_cosine


class Module(lightning.LightningModule):
    """Model, losses and optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT()

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
    accelerator="cpu",
    devices=1,
    max_steps=steps,
    accumulate_grad_batches=ACCUMULATE,
    gradient_clip_val=1.0,
)
trainer.fit(module, DataLoader(train, BATCH // ACCUMULATE, shuffle=True))
[metrics] = trainer.validate(module, DataLoader(val, 8))
trainer.save_checkpoint("checkpoint.ckpt")
print(f"validation: {metrics['loss'] / math.log(2):.4f} bits per byte")
