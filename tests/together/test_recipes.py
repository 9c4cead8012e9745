"""The recipes under ``examples/`` are the runs of the scripts beside them."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.optim import AdamW

from tests.together.test_docs import ROOT
from torchweld import Trainer, use
from torchweld.cli import main

FOLDER = ROOT / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
NEEDS = {"article": ("composer", "deepspeed", "ffcv"), "digits": ("composer",)}
SCRIPTS = {path.stem for path in ROOT.glob("examples/*.py")}
NO_RECIPE = {"gan"}
"""It has a loop of its own; docs/launching.md says so."""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe makes what lies beside its files importable; that ends with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def train(name: str, *words: str) -> str:
    ended = CliRunner().invoke(main, ["train", str(FOLDER / f"{name}.toml"), *words])
    assert ended.exit_code == 0, ended.output
    return ended.output


def assert_equal_weights(one: str, other: str) -> None:
    trained, expected = load_file(one), load_file(other)
    assert trained.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(trained[name], value)] == []


def test_every_script_that_leaves_the_loop_to_fit_has_a_recipe() -> None:
    assert {path.stem for path in RECIPES} == (SCRIPTS - NO_RECIPE) | {"digits"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_a_recipe_can_be_run(name: str) -> None:
    missing = [module for module in NEEDS.get(name, ()) if find_spec(module) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")

    shown = train(name, "--dry-run")

    assert " 0 problems" in shown
    assert list(Path().iterdir()) == []


@pytest.mark.slow
def test_the_recipe_ends_with_the_weights_of_its_script() -> None:
    pytest.importorskip("composer")

    train("digits", "--set", "trainer.max_epochs=1", "--set", "export=recipe.safetensors")
    importlib.import_module("examples.recipes.digits").main(1)

    assert_equal_weights("recipe.safetensors", "digits.safetensors")


@pytest.mark.slow
def test_the_recipe_of_the_language_model_ends_with_the_weights_of_its_script() -> None:
    gpt = importlib.import_module("examples.gpt")

    words = ("trainer.max_steps=3", "trainer.limit_val_batches=1", "export=recipe.safetensors")
    train("gpt", *(part for word in words for part in ("--set", word)))
    trainer = gpt.make_trainer("single", 3, Path("runs"))
    train_data, val = gpt.load_data()
    gpt.fit(trainer, train_data, torch.utils.data.Subset(val, range(8)))
    trainer.export("script.safetensors")

    assert_equal_weights("recipe.safetensors", "script.safetensors")


@pytest.mark.slow
def test_a_recipe_takes_the_function_that_makes_batches_from_a_script() -> None:
    """Paragraphs of unequal length: without it torch cannot stack them."""
    script = importlib.import_module("examples.text_classification")
    loading = partial(use, "torch", collate_fn=script.collate)

    words = ("trainer.max_steps=3", "trainer.limit_val_batches=1", "export=recipe.safetensors")
    train("text_classification", *(part for word in words for part in ("--set", word)))
    trainer = Trainer(
        data=loading(batch_size=32),
        val_data=loading(batch_size=100),
        max_steps=3,
        max_epochs=6,
        limit_val_batches=1,
        gradient_clip_val=1.0,
        seed=0,
    )
    trainer.fit(
        script.Classifier,
        *script.load_data(),
        metrics={"accuracy": script.accuracy},
        optimizer=partial(AdamW, lr=2e-3, weight_decay=0.1),
        param_groups=script.decay,
        lr_scheduler=script.warmup_linear,
    )
    trainer.export("script.safetensors")

    assert_equal_weights("recipe.safetensors", "script.safetensors")
