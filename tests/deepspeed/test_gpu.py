"""What needs CUDA devices, as many as are found: ``python3 noxfile.py -s gpu``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from torchweld import Trainer, use
from torchweld.testing import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WORLD_SIZE = max(torch.cuda.device_count(), 1)
SECONDS = 300.0
SEED = 5
FEATURES, CLASSES, BATCH_SIZE = 64, 8, 8
LEARNT = 0.5  # nats; 2.08 for who knows nothing of eight classes
STAGES = (1, 2, 3)
# With 1e-8, Adam divides the rounding noise of the smallest gradients by their own size.
ADAMW = partial(AdamW, lr=1e-2, eps=1e-4)


def make_model(width: int = 128) -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(
        nn.Linear(FEATURES, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, CLASSES),
    )


def make_data(num_samples: int = 512) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, FEATURES, generator=generator)
    return TensorDataset(inputs, inputs[:, :CLASSES].argmax(1))


def make_trainer(options: Mapping[str, Any], precision: str = "32", steps: int = 100) -> Trainer:
    return Trainer(
        strategy=use("deepspeed", **options),
        data=use("torch", batch_size=BATCH_SIZE),
        precision=precision,
        max_steps=steps,
        barebones=True,
        seed=SEED,
    )


# ---- learning ------------------------------------------------------------------------------------


def _loss(options: Mapping[str, Any], precision: str) -> float:
    """The loss at the end of a short training."""
    trainer = make_trainer(options, precision)
    trainer.fit(make_model(), make_data(), loss=F.cross_entropy, optimizer=ADAMW)
    return trainer.evaluate(data=make_data())["loss"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["32", "bf16", "bf16-true", "16"])
def test_every_stage_learns_in_every_precision(stage: int, precision: str) -> None:
    losses = run_ranks(_loss, WORLD_SIZE, {"stage": stage}, precision, timeout_seconds=SECONDS)

    assert max(losses) < LEARNT


@pytest.mark.parametrize("stage", STAGES)
def test_an_offloaded_optimizer_learns(stage: int) -> None:
    options = {"stage": stage, "offload_optimizer": "cpu"}

    losses = run_ranks(_loss, WORLD_SIZE, options, "bf16", timeout_seconds=SECONDS)

    assert max(losses) < LEARNT


def test_offloaded_parameters_learn() -> None:
    options = {"stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu"}

    losses = run_ranks(_loss, WORLD_SIZE, options, "32", timeout_seconds=SECONDS)

    assert max(losses) < LEARNT


@pytest.mark.parametrize("stage", [2, 3])
def test_an_exchange_beside_backward_learns(stage: int) -> None:
    options = {"stage": stage, "overlap_comm": True}

    losses = run_ranks(_loss, WORLD_SIZE, options, "bf16", timeout_seconds=SECONDS)

    assert max(losses) < LEARNT


# ---- against DDP by hand -------------------------------------------------------------------------


def _weights_by_hand() -> dict[str, Tensor]:
    dist.init_process_group("nccl")
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    model = make_model().to(device)
    wrapped = DistributedDataParallel(model, device_ids=[device.index])
    data = make_data()
    sampler: DistributedSampler[Any] = DistributedSampler(data, seed=SEED)
    optimizer = ADAMW(model.parameters())
    for inputs, targets in DataLoader(data, BATCH_SIZE, sampler=sampler):
        F.cross_entropy(wrapped(inputs.to(device)), targets.to(device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def _weights(options: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    data = make_data()
    trainer = Trainer(
        strategy=use("deepspeed", **options),
        data=use("torch", batch_size=BATCH_SIZE),
        max_steps=len(data) // BATCH_SIZE // WORLD_SIZE,
        gradient_clip_val=0.5,
        barebones=True,
        seed=SEED,
    )
    trainer.fit(make_model(), data, loss=F.cross_entropy, optimizer=ADAMW)
    return load_file(trainer.export(folder / "weights.safetensors"))


@pytest.mark.parametrize("offload", [{}, {"offload_optimizer": "cpu"}], ids=["on the GPU", "cpu"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_equals_ddp_by_hand(
    stage: int, offload: Mapping[str, Any], tmp_path: Path
) -> None:
    expected = run_ranks(_weights_by_hand, WORLD_SIZE, timeout_seconds=SECONDS)[0]

    options = {"stage": stage, **offload}
    result = run_ranks(_weights, WORLD_SIZE, options, tmp_path, timeout_seconds=SECONDS)[0]

    # Two launches sum in different orders, and the CPU updates with other instructions.
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)


# ---- bytes on the device -------------------------------------------------------------------------

WIDTH = 2048
NUM_PARAMETERS = sum(p.numel() for p in make_model(WIDTH).parameters())


def _bytes_per_parameter(options: Mapping[str, Any]) -> float:
    """GPU memory that stays allocated after some steps, for each parameter of the whole model."""
    trainer = make_trainer({"bucket_elements": 2**16, **options}, steps=3)
    with trainer.prepare(
        make_model(WIDTH), make_data(), loss=F.cross_entropy, optimizer=ADAMW
    ) as run:
        before = torch.cuda.memory_allocated(run.env.device)
        for inputs, targets in run.batches():
            run.backward(run.loss(run.model(inputs), targets))
            run.step()
        after = torch.cuda.memory_allocated(run.env.device)
    assert after >= before  # Adam's tensors came with the first step
    return after / NUM_PARAMETERS


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # fp32 weights, a fp32 copy and Adam's two; the copy and Adam's are shared out.
        ({"stage": 1}, 4 + 12 / WORLD_SIZE),
        ({"stage": 2}, 4 + 12 / WORLD_SIZE),
        # The weights and the buffer of gradients are shared out too.
        ({"stage": 3}, 20 / WORLD_SIZE),
        ({"stage": 2, "offload_optimizer": "cpu"}, 4),
    ],
    ids=["stage 1", "stage 2", "stage 3", "stage 2, offloaded"],
)
def test_bytes_on_the_device_are_those_of_the_formula(
    options: Mapping[str, Any], expected: float
) -> None:
    held = run_ranks(_bytes_per_parameter, WORLD_SIZE, options, timeout_seconds=SECONDS)

    assert max(held) == pytest.approx(expected, rel=0.1)


def test_offloaded_parameters_leave_the_device() -> None:
    options = {"stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu"}

    held = run_ranks(_bytes_per_parameter, WORLD_SIZE, options, timeout_seconds=SECONDS)

    assert max(held) < 2
