"""Arguments of other trainers, and what does the same here."""

from __future__ import annotations

from collections.abc import Mapping

TRAINER: Mapping[str, str] = {
    "benchmark": "set torch.backends.cudnn.benchmark",
    "detect_anomaly": "call torch.autograd.set_detect_anomaly(True)",
    "gpus": "accelerator='cuda', and torchrun --nproc-per-node says how many",
    "limit_predict_batches": "give predict less data",
    "limit_test_batches": "give evaluate less data",
    "min_epochs": "a run is as long as max_epochs= and max_steps= say, unless a callback ends it",
    "min_steps": "a run is as long as max_epochs= and max_steps= say, unless a callback ends it",
    "num_nodes": "torchrun --nnodes says how many",
    "plugins": "strategy=, data= and surgery= take them",
    "profiler": "callbacks=[ProfilerWindow()] profiles some steps",
    "reload_dataloaders_every_n_epochs": "the data of a run stays the same; call fit again",
    "resume_from_checkpoint": "fit(ckpt_path=…) takes 'last', 'best' or a path",
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

PREPARE: Mapping[str, str] = {
    **FIT,
    "step": "an own loop computes its loss itself: run.backward(loss)",
}

EVALUATE: Mapping[str, str] = {
    "ckpt_path": "init_weights= takes a file of weights",
    "dataloader": "give it as data=",
    "dataloaders": "give it as data=",
    "val": "give it as data=",
}
