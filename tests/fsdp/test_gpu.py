"""What needs CUDA devices, as many as are found: ``python3 noxfile.py -s gpu``."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from examples.gpt import CONTEXT, GPT, nats_per_byte
from torchweld import Trainer, use
from torchweld.testing import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WORLD_SIZE = torch.cuda.device_count()
SEED = 5
WIDTH, DEPTH, HEADS = 64, 2, 4
LEARNT = 1.5  # nats; 2.8 for who knows only how often each of the seventeen bytes comes


def make_model() -> GPT:
    torch.manual_seed(SEED)
    return GPT(WIDTH, DEPTH, HEADS)


def make_data(num_windows: int = 64) -> TensorDataset:
    """A text of seventeen bytes, again and again."""
    text = torch.arange(num_windows * CONTEXT + 1) % 17
    return TensorDataset(text[:-1].view(-1, CONTEXT), text[1:].view(-1, CONTEXT))


def make_trainer(strategy: Any, precision: str = "32", steps: int = 120) -> Trainer:
    return Trainer(
        strategy=strategy,
        data=use("torch", batch_size=4),
        precision=precision,
        max_steps=steps,
        barebones=True,
        seed=SEED,
    )


def _loss(strategy: Any, precision: str) -> float:
    """The loss at the end of a short training."""
    trainer = make_trainer(strategy, precision)
    trainer.fit(make_model, make_data(), loss=nats_per_byte, optimizer=partial(AdamW, lr=1e-3))
    return trainer.evaluate(data=make_data())["loss"]


@pytest.mark.parametrize("precision", ["16", "bf16", "bf16-true"])
def test_fsdp_learns_in_reduced_precision(precision: str) -> None:
    losses = run_ranks(_loss, WORLD_SIZE, "fsdp", precision, timeout_seconds=300)

    assert max(losses) < LEARNT


def test_fsdp_learns_when_parameters_are_gathered_in_bf16() -> None:
    strategy = use("fsdp", param_dtype="bf16")

    losses = run_ranks(_loss, WORLD_SIZE, strategy, "bf16", timeout_seconds=300)

    assert max(losses) < LEARNT


@pytest.mark.skipif(not find_spec("fairscale"), reason="needs fairscale")
def test_fairscale_fsdp_learns() -> None:
    losses = run_ranks(_loss, WORLD_SIZE, "fairscale_fsdp", "32", timeout_seconds=300)

    assert max(losses) < LEARNT


# ---- against FSDP2 by hand -----------------------------------------------------------------------


def _weights_by_hand() -> dict[str, Tensor]:
    device = torch.device("cuda", dist_device())
    model = make_model().to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    data = make_data()
    sampler: DistributedSampler[Any] = DistributedSampler(data, seed=SEED)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for inputs, targets in DataLoader(data, 4, sampler=sampler):
        nats_per_byte(model(inputs.to(device)), targets.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole: dict[str, Any] = dict(model.state_dict())
    return {name: tensor.full_tensor().cpu() for name, tensor in whole.items()}


def dist_device() -> int:
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank())
    return dist.get_rank()


def _weights(strategy: Any, folder: Path) -> dict[str, Tensor]:
    data = make_data()
    steps = len(data) // 4 // WORLD_SIZE
    trainer = make_trainer(strategy, steps=steps)
    optimizer = partial(SGD, lr=0.1, momentum=0.9)
    trainer.fit(make_model, data, loss=nats_per_byte, optimizer=optimizer)
    return load_file(trainer.export(folder / "weights.safetensors"))


@pytest.mark.parametrize("options", [{}, {"cpu_offload": True}], ids=["on the GPU", "offloaded"])
def test_fsdp_equals_fsdp2_by_hand(options: dict[str, Any], tmp_path: Path) -> None:
    expected = run_ranks(_weights_by_hand, WORLD_SIZE, timeout_seconds=300)[0]

    result = run_ranks(_weights, WORLD_SIZE, use("fsdp", **options), tmp_path, timeout_seconds=300)[
        0
    ]

    # Atomic additions of a GPU have no fixed order, and the CPU updates with other instructions.
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


# ---- memory --------------------------------------------------------------------------------------


def make_large_model() -> GPT:
    return GPT(1024, 8, 16)


def _bytes_per_parameter(strategy: Any) -> float:
    """GPU memory that stays allocated after some steps, over the parameters of the whole model."""
    device = torch.device("cuda", dist_device())
    square = torch.ones(8, 8, device=device, requires_grad=True)
    (square @ square).sum().backward()  # cuBLAS takes its workspaces
    before = torch.cuda.memory_allocated()
    trainer = make_trainer(strategy, steps=3)
    with trainer.prepare(
        make_large_model, make_data(), loss=nats_per_byte, optimizer=partial(AdamW, lr=1e-3)
    ) as run:
        for inputs, targets in run.batches():
            run.backward(run.loss(run.model(inputs), targets))
            run.step()
        held = torch.cuda.memory_allocated() - before
    return held / sum(p.numel() for p in make_large_model().parameters())


def test_memory_of_fsdp_is_a_share_of_weights_and_adams_state() -> None:
    held = run_ranks(_bytes_per_parameter, WORLD_SIZE, "fsdp", timeout_seconds=300)

    # Four bytes each for the weight and Adam's two; gradients are gone after a step.
    assert max(held) == pytest.approx(12 / WORLD_SIZE, rel=0.1)


def test_offloaded_shards_leave_the_gpu() -> None:
    strategy = use("fsdp", cpu_offload=True)

    held = run_ranks(_bytes_per_parameter, WORLD_SIZE, strategy, timeout_seconds=300)

    assert max(held) < 2 / WORLD_SIZE
