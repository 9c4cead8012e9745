"""A misspelt argument, or another trainer's, is answered with the one that was meant."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from torchweld import EarlyStopping, ModelCheckpoint, Trainer
from torchweld.errors import InvalidArgument
from torchweld.setup import elsewhere

CALLS: dict[str, tuple[Any, str, str]] = {
    "trainer": (Trainer, "max_epoch", r"Trainer\(max_epoch=…\): .*; did you mean 'max_epochs'\?"),
    "lightning": (Trainer, "num_nodes", "torchrun --nnodes says how many"),
    "nothing near": (Trainer, "xyzzy", "it takes accelerator, accumulate_grad_batches, .*val_data"),
    "fit": ("fit", "optimiser", "did you mean 'optimizer'"),
    "fit of another": (
        "fit",
        "val_dataloaders",
        "give it as val=",
    ),
    "prepare": ("prepare", "lossfn", "did you mean 'loss'"),
    "evaluate": ("evaluate", "metric", "did you mean 'metrics'"),
    "predict": (
        "predict",
        "init_weight",
        "did you mean 'init_weights'",
    ),
    "checkpoint": (ModelCheckpoint, "save_top", "did you mean 'save_top_k'"),
    "stopping": (EarlyStopping, "patient", "did you mean 'patience'"),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_argument_is_answered_with_the_one_that_was_meant(name: str) -> None:
    call, argument, words = CALLS[name]
    if isinstance(call, str):
        call = getattr(Trainer(), call)

    with pytest.raises(InvalidArgument, match=words):
        call(**{argument: 1})


@pytest.mark.parametrize(
    ("call", "table"),
    [
        (Trainer, elsewhere.TRAINER),
        (Trainer.fit, elsewhere.FIT),
        (Trainer.prepare, elsewhere.PREPARE),
        (Trainer.evaluate, elsewhere.EVALUATE),
    ],
    ids=["trainer", "fit", "prepare", "evaluate"],
)
def test_the_answers_name_arguments_that_there_are(
    call: Callable[..., Any], table: Mapping[str, str]
) -> None:
    known = set(inspect.signature(call).parameters)
    named = set(re.findall(r"(\w+)=", " ".join(table.values())))

    assert not known & set(table)
    others = {*inspect.signature(Trainer).parameters, *inspect.signature(Trainer.fit).parameters}
    assert named <= known | others | {"shard"}  # of the data source torch


def test_what_a_function_takes_can_still_be_asked() -> None:
    assert list(inspect.signature(Trainer).parameters)[:2] == ["strategy", "data"]
    assert inspect.getdoc(Trainer.fit).startswith("Train ``model``")  # type: ignore[union-attr]  # it has one
