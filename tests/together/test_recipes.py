"""The recipes under ``examples/`` are the runs of the scripts beside them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.together.test_docs import ROOT
from torchweld.cli import main

FOLDER = ROOT / "examples" / "recipes"


@pytest.mark.slow
def test_the_recipe_ends_with_the_weights_of_its_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("composer")
    monkeypatch.chdir(tmp_path)
    words = ["train", str(FOLDER / "digits.toml"), "--set", "trainer.max_epochs=1"]

    ended = CliRunner().invoke(main, [*words, "--set", "export=recipe.safetensors"])
    importlib.import_module("examples.recipes.digits").main(1)

    assert ended.exit_code == 0, ended.output
    trained, expected = load_file("recipe.safetensors"), load_file("digits.safetensors")
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], value) for name, value in expected.items())
