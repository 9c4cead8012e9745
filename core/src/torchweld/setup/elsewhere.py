"""Arguments of other trainers, and what does the same here."""

from __future__ import annotations

from collections.abc import Mapping

TRAINER: Mapping[str, str] = {
    "benchmark": "set torch.backends.cudnn.benchmark",
    "detect_anomaly": "call torch.autograd.set_detect_anomaly(True)",
    "gpus": "accelerator='cuda', and torchrun --nproc-per-node says how many",
    "num_nodes": "torchrun --nnodes says how many",
    "plugins": "strategy=, data= and surgery= take them",
    "profiler": "callbacks=[ProfilerWindow()] profiles some steps",
    "use_distributed_sampler": "data=use('torch', shard=False) leaves the sharing out to you",
}
"""Those of Lightning's Trainer."""

FIT: Mapping[str, str] = {
    "criterion": "loss= takes (outputs, targets)",
    "datamodule": "give its loaders as train= and val=",
    "loss_fn": "loss= takes (outputs, targets)",
    "resume_from_checkpoint": "ckpt_path= takes 'last', 'best' or a path",
    "scheduler": "lr_scheduler= makes one: (optimizer, total_steps) -> scheduler",
    "train_dataloader": "give it as train=",
    "train_dataloaders": "give it as train=",
    "train_dataset": "give it as train=",
    "eval_dataset": "give it as val=",
    "val_dataloader": "give it as val=",
    "val_dataloaders": "give it as val=, several as a mapping",
}
"""Those of Lightning's ``fit``, and of others."""
