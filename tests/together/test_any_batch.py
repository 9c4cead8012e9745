"""Batches and losses of every form that scripts have: Hugging Face models, lists, named losses."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from tests.parity.training import different
from torchweld import Trainer, use
from torchweld.testing import run_ranks

transformers = pytest.importorskip("transformers")
ADAMW = partial(AdamW, lr=1e-2, eps=1e-4)
STRATEGIES = {"ddp": "ddp", "fsdp": "fsdp", "zero2": use("deepspeed", stage=2)}
WEIGHTS = 1e-5  # absolute, after six steps


# ---- a model of Hugging Face: mapping batches, the loss in its output, tied weights --------------


class Sentences(Dataset[dict[str, Tensor]]):
    """Word numbers and a mask; each item a mapping. Some words are padding."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(2, 40, (9,), generator=generator)
        mask = torch.ones(9, dtype=torch.int64)
        mask[9 - index % 3 :] = 0
        labels = torch.where(mask == 1, words, -100)
        return {"input_ids": words, "attention_mask": mask, "labels": labels}


def gather(items: list[dict[str, Tensor]]) -> Any:
    """What a tokenizer's ``pad`` returns: a ``UserDict``, no ``dict``."""
    stacked = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    return transformers.BatchEncoding(stacked)


def make_language_model() -> nn.Module:
    """GPT-2 with 2 tiny layers; input and output embeddings are one tensor."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=12, n_layer=2, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]  # no hints


def _train(strategy: Any) -> dict[str, Any]:
    model = make_language_model()
    loader = DataLoader(Sentences(), 4, collate_fn=gather)
    trainer = Trainer(strategy=strategy, max_epochs=1, barebones=True, max_steps=6)
    result = trainer.fit(model, loader, loader, optimizer=ADAMW)
    outputs = trainer.predict(data=loader)
    return {
        "metrics": result.metrics,
        "logits": outputs[0].logits,
        "weights": {n: _whole(p) for n, p in model.named_parameters()},
        "loss": trainer.evaluate(data=loader)["loss"],
    }


def _whole(parameter: Any) -> Tensor:
    tensor: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return tensor.detach()


def test_a_hugging_face_model_is_trained_as_by_hand_bitwise() -> None:
    expected = make_language_model().train()
    optimizer = ADAMW(expected.parameters())
    for batch in DataLoader(Sentences(), 4, collate_fn=gather):
        expected(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    result = _train("single")

    assert different(dict(expected.named_parameters()), result["weights"]) == []
    assert result["loss"] == pytest.approx(result["metrics"]["val_loss"])
    assert result["logits"].shape == (4, 9, 40)


def _train_all() -> dict[str, Any]:
    return {name: _train(strategy) for name, strategy in STRATEGIES.items()}


@pytest.mark.slow
def test_a_hugging_face_model_is_trained_alike_under_every_strategy() -> None:
    found = run_ranks(_train_all, 2, timeout_seconds=300)[0]

    for name in ("fsdp", "zero2"):
        assert found[name]["metrics"]["val_loss"] == pytest.approx(
            found["ddp"]["metrics"]["val_loss"], abs=WEIGHTS
        )
        for key, weight in found["ddp"]["weights"].items():
            torch.testing.assert_close(
                found[name]["weights"][key], weight, atol=WEIGHTS, rtol=0, msg=f"{name} {key}"
            )


# ---- lists of mappings with what is no tensor, as detection has them -----------------------------


class Boxes(Dataset[dict[str, Any]]):
    """Pictures of different sizes, with a name and any number of boxes."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {
            "image": torch.randn(3, 6 + index % 3, 7, generator=generator),
            "boxes": torch.randn(index % 4, 4, generator=generator),
            "name": f"picture {index}",
            "meta": UserDict(scale=1.0 + index),
        }


class Detector(nn.Module):
    """Looks at each picture; in training it returns losses, in evaluation boxes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 4)

    def forward(self, images: list[Tensor], boxes: list[Tensor] | None = None) -> Any:
        found = torch.stack([self.head(self.body(image).mean((1, 2))) for image in images])
        if boxes is None:
            return [{"boxes": box} for box in found]
        means = torch.stack([box.sum(0) for box in boxes])
        return {"place": F.l1_loss(found, means), "size": found.square().mean()}


def named_losses(run: Any, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Adds the model's losses up; both are logged by name."""
    assert all(item["name"].startswith("picture") for item in batch)
    losses = run.model([item["image"] for item in batch], [item["boxes"] for item in batch])
    return {"loss": losses["place"] + 0.1 * losses["size"], **losses}


def detect(run: Any, batch: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Boxes, and what they should be."""
    found = run.model([item["image"] for item in batch])
    return (
        torch.stack([item["boxes"] for item in found]),
        torch.stack([item["boxes"].sum(0) for item in batch]),
    )


def test_lists_of_mappings_and_named_losses_are_trained_as_by_hand_bitwise() -> None:
    loader: DataLoader[Any] = DataLoader(Boxes(), 4, collate_fn=list)
    expected = Detector()
    optimizer = ADAMW(expected.parameters())
    places = []
    for batch in loader:
        losses = expected([i["image"] for i in batch], [i["boxes"] for i in batch])
        (losses["place"] + 0.1 * losses["size"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        places += [float(losses["place"])] * len(batch)  # 4, 4 and 2: the mean over samples
    model, trainer = Detector(), Trainer(max_epochs=1, barebones=True)

    result = trainer.fit(
        model, loader, loader, step=named_losses, eval_step=detect, optimizer=ADAMW,
        metrics={"near": _near},
    )  # fmt: skip

    assert different(expected.state_dict(), model.state_dict()) == []
    assert result.metrics["place"] == pytest.approx(sum(places) / len(places))
    assert {"size", "train_loss", "val_near"} <= result.metrics.keys()
    assert sum(len(part) for part in trainer.predict(data=loader, eval_step=detect)) == 10


def _near(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    return (outputs - targets).abs().mean(1).sum(), len(targets)


# ---- losses that need more than outputs and targets ----------------------------------------------


class Weighted(Dataset[dict[str, Tensor]]):
    """Every sample with a weight of its own."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        inputs, targets = torch.randn(5, generator=generator), torch.randn(2, generator=generator)
        return {"input": inputs, "targets": targets, "weight": torch.tensor(1.0 + index)}


class Keywords(nn.Module):
    """Takes a whole mapping, and uses a part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 2)

    def forward(self, input: Tensor, **_: Tensor) -> Tensor:
        return self.layer(input)  # type: ignore[no-any-return]  # torch says Any


def weighted_loss(outputs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A loss function sees the whole mapping, weights and all; it may name its parts."""
    each = (outputs - batch["targets"]).square().mean(1)
    return {"loss": (each * batch["weight"]).mean(), "unweighted": each.mean()}


def test_a_loss_sees_the_whole_mapping_and_may_name_its_parts() -> None:
    loader = DataLoader(Weighted(), 4)
    expected = Keywords()
    optimizer = ADAMW(expected.parameters())
    for batch in loader:
        weighted_loss(expected(batch["input"]), batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    model = Keywords()

    result = Trainer(max_epochs=1, barebones=True).fit(
        model, loader, loader, loss=weighted_loss, optimizer=ADAMW
    )

    assert different(expected.state_dict(), model.state_dict()) == []
    assert {"unweighted", "val_loss"} <= result.metrics.keys()


def test_a_plain_teacher_inside_step_is_left_as_it_is() -> None:
    teacher, student = Keywords().eval().requires_grad_(False), nn.Linear(5, 2)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}

    def distil(run: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return F.mse_loss(run.model(batch["input"]), teacher(batch["input"]))

    first, last = (
        Trainer(max_epochs=epochs, barebones=True)
        .fit(student, DataLoader(Weighted(), 4), step=distil, optimizer=ADAMW)
        .metrics["train_loss"]
        for epochs in (1, 20)
    )

    assert last < first / 2
    assert different(before, teacher.state_dict()) == []
