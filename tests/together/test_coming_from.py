"""The scripts of ``docs/coming-from.md``: before and after end with the same weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.core.forked_scripts import run_script
from tests.together.test_docs import BLOCK, ROOT, write_files

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "coming-from.md"
NEEDS = {"plain": "torch", "lightning": "lightning", "accelerate": "accelerate"}
SAVE = """
from digits import model as trained
from safetensors.torch import save_file
save_file(trained.state_dict(), "weights.safetensors")
"""


def blocks(word: str, value: str) -> list[str]:
    """The code of all blocks behind ``<!-- word: value -->``."""
    found = BLOCK.finditer(PAGE.read_text("utf-8"))
    return [b["code"] for b in found if (b["word"], b["value"]) == (word, value)]


def result_of(code: str, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """The last line that a script prints, and the weights of its model."""
    [digits] = blocks("file", "digits.py")
    write_files(folder, {"digits.py": digits, "script.py": code + SAVE})
    printed = run_script(folder / "script.py")
    return printed.splitlines()[-1], load_file(folder / "weights.safetensors")


@pytest.mark.parametrize("name", NEEDS)
def test_scripts_before_and_after_end_with_the_same_weights(name: str, tmp_path: Path) -> None:
    if not find_spec(NEEDS[name]):
        pytest.skip(f"needs {NEEDS[name]}")

    results = [
        result_of(code, tmp_path / str(number)) for number, code in enumerate(blocks("pair", name))
    ]

    before, *after = results
    assert after
    assert before[0].startswith("accuracy: ")
    for printed, weights in after:
        assert printed == before[0]
        assert [n for n in before[1] if not torch.equal(weights[n], before[1][n])] == []
