"""The Trainer with other people's metrics and loggers: torchmetrics, Lightning's, wandb."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassRecall,
)

from tests.core.trainings import arguments, make_data, make_loader, make_model, of_dataset
from torchweld import Trainer, use
from torchweld.testing import empty_registry, run_ranks

# torchmetrics warns where a rank was given no sample, and imports pkg_resources.
pytestmark = pytest.mark.filterwarnings("ignore")


def metrics() -> dict[str, Any]:
    """One of each kind: a number, a vector, a collection, one that keeps every sample."""
    return {
        "accuracy": MulticlassAccuracy(3, average="micro"),
        "recall": MulticlassRecall(3, average="none"),
        "some": MetricCollection({"f1": MulticlassF1Score(3), "macro": MulticlassAccuracy(3)}),
        "auroc": MulticlassAUROC(3),
        "mine": lambda outputs, targets: ((outputs.argmax(1) == targets).sum(), len(targets)),
    }


def make_probable() -> nn.Module:
    """Gives probabilities: AUROC guesses for each batch anew whether it is given logits."""
    return nn.Sequential(make_model(), nn.Softmax(1))


def expected(num_samples: int) -> dict[str, float]:
    """All samples at once, by torchmetrics alone."""
    inputs, targets = make_data(num_samples).tensors
    outputs = make_probable()(inputs).detach()
    found: dict[str, Any] = {"loss": F.cross_entropy(outputs, targets)}
    for name, metric in metrics().items():
        if name == "mine":
            found[name] = found["accuracy"]
            continue
        value: Any = metric(outputs, targets)
        if isinstance(value, dict):
            found.update({f"{name}_{key}": one for key, one in value.items()})
        elif value.dim():
            found.update({f"{name}_{place}": one for place, one in enumerate(value)})
        else:
            found[name] = value
    return {name: float(value) for name, value in found.items()}


def evaluate(num_samples: int, strategy: Any) -> dict[str, float]:
    trainer = Trainer(strategy=strategy, data=of_dataset(), barebones=True)
    return trainer.evaluate(
        make_probable(), make_data(num_samples), loss=F.cross_entropy, metrics=metrics()
    )


@pytest.mark.parametrize("num_samples", [13, 24])
def test_torchmetrics_are_those_of_all_samples_at_once(num_samples: int) -> None:
    assert evaluate(num_samples, "single") == pytest.approx(expected(num_samples), rel=1e-6)


STRATEGIES: dict[str, Any] = {
    "ddp": "ddp",
    "fsdp": "fsdp",
    "zero1": use("deepspeed", stage=1),
    "zero3": use("deepspeed", stage=3),
}


def evaluate_all(sizes: list[int], name: str) -> list[dict[str, float]]:
    return [evaluate(size, STRATEGIES[name]) for size in sizes]


@pytest.mark.parametrize("name", STRATEGIES)
def test_torchmetrics_on_two_ranks_are_those_of_one(name: str) -> None:
    """Also where the last batch is uneven, and where the second rank has no sample at all."""
    sizes = [13, 24, 9, 1]

    first, second = run_ranks(evaluate_all, 2, sizes, name)

    assert str(first) == str(second)
    for size, found in zip(sizes, first, strict=True):
        assert found == pytest.approx(expected(size), rel=1e-6, nan_ok=True)


def test_a_collection_by_itself_names_its_values() -> None:
    collection = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3)])
    trainer = Trainer(barebones=True, registry=empty_registry())

    result = trainer.fit(
        make_model(), make_loader(), {"seen": make_loader(13), "unseen": make_loader(9)},
        metrics=collection, **arguments(),
    )  # fmt: skip

    measured = {name for name in result.metrics if name.startswith("val_")}
    assert measured == {
        f"val_{metric}/{data}"
        for metric in ("loss", "MulticlassAccuracy", "MulticlassF1Score")
        for data in ("seen", "unseen")
    }


def log_to(logger: Any, root: Path) -> Any:
    trainer = Trainer(
        logger=[logger], max_epochs=2, log_every_n_steps=3, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, registry=empty_registry(),
        default_root_dir=root,
    )  # fmt: skip
    return trainer.fit(
        make_model(), make_loader(), make_loader(9), hparams={"width": 8}, **arguments()
    )


def test_lightnings_csv_logger_gets_everything(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="lightning", version=0)

    result = log_to(logger, tmp_path)

    text = (tmp_path / "lightning" / "version_0" / "metrics.csv").read_text("utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["step"] for row in rows] == ["3", "6", "9", "12"]
    assert float(rows[-1]["val_loss"]) == pytest.approx(result.metrics["val_loss"])
    assert "width: 8" in (tmp_path / "lightning/version_0/hparams.yaml").read_text("utf-8")


def test_wandb_offline_gets_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="torchweld", offline=True, save_dir=tmp_path)

    result = log_to(logger, tmp_path)

    experiment: Any = logger.experiment
    assert experiment.summary["val_loss"] == pytest.approx(result.metrics["val_loss"])
    assert experiment.config["width"] == 8
    experiment.finish()


def test_outputs_of_a_metric_object_stay_tensors_of_the_run() -> None:
    class Largest:
        """An object that is no module, as people write them."""

        def reset(self) -> None:
            self.value = torch.tensor(0.0)

        def update(self, outputs: Tensor, targets: Tensor) -> None:
            self.value = torch.maximum(self.value, outputs.max())

        def compute(self) -> Tensor:
            return self.value

    trainer = Trainer(barebones=True, registry=empty_registry())
    model = make_model()

    found = trainer.evaluate(model, make_loader(13), metrics={"largest": Largest()})

    assert found["largest"] == pytest.approx(model(make_data(13).tensors[0]).max().item())
