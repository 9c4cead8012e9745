"""Scripts of a practitioner, moved in: each ends with the weights of its plain version."""

from __future__ import annotations

import importlib
import io
import os
import re
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from difflib import unified_diff
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.together.test_docs import ROOT
from torchweld import ModelCheckpoint
from torchweld.testing import run_ranks
from torchweld.testing.processes import RanksFailed

PAGE = ROOT / "docs" / "examples.md"
TIMEOUT = 300.0
KINDS = ("compiled", "whole", "resumed")


@dataclass(frozen=True)
class Example:
    """A pair of scripts and how they are tried.

    Attributes:
        arguments: for a run that is short and still learns.
        strategies: those that it is started with on two processes; they end alike. None where
            its plain version runs on two processes too: it is compared to that.
        score: the pattern of what both print at their end.
        learnt: the least score that is no accident; the most, where lower is better.
    """

    arguments: tuple[str, ...]
    strategies: tuple[str, ...]
    score: str
    learnt: float
    lower: bool = False
    tolerance: float = 1e-5


EXAMPLES = {
    "image_classifier": Example(("--epochs=2",), ("ddp",), "accuracy", 0.3),
    "text_classification": Example(("--epochs=1",), ("ddp", "fsdp"), "accuracy", 0.25),
    "vae": Example(("--epochs=8",), ("ddp", "deepspeed"), "error of a pixel", 0.25, lower=True),
    "gan": Example(("--epochs=10",), ("ddp", "fsdp"), "error of the mean drawing", 0.3, lower=True),
    "finetuning": Example(("--epochs=3", "--unfreeze=1"), ("fsdp",), "accuracy", 0.3),
    "gpt": Example(("--steps=12",), (), "validation", 7.0, lower=True),
}


def run_script(module: str, *arguments: str) -> tuple[str, dict[str, Tensor]]:
    """Run a script's ``main`` in the working directory; what it printed, what it saved."""
    sys.argv = [f"{module}.py", *arguments]
    printed = io.StringIO()
    with redirect_stdout(printed):
        importlib.import_module(module).main()
    saved = {
        f"{path.name}: {name}": tensor
        for path in saved_files()
        for name, tensor in load_file(path).items()
    }
    return printed.getvalue(), saved


def saved_files() -> list[Path]:
    """What a script saves at its end; checkpoints lie deeper.

    Nothing for ranks but 0: they may look while rank 0 is still writing.
    """
    if os.environ.get("RANK", "0") != "0":
        return []
    return sorted([*Path.cwd().glob("*.safetensors"), *Path.cwd().glob("*/*.safetensors")])


def run_both(name: str, arguments: tuple[str, ...]) -> list[tuple[str, dict[str, Tensor]]]:
    plain = run_script(f"examples.plain.{name}", *arguments)
    for path in saved_files():
        path.unlink()
    return [plain, run_script(f"examples.{name}", *arguments)]


def score(name: str, printed: str) -> float:
    """The number behind the name of the score, in the last line that has one."""
    found = re.findall(rf"^{EXAMPLES[name].score}: ([\d.]+)\b", printed, re.MULTILINE)
    return float(found[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_moved_in_script_ends_with_the_weights_of_its_plain_version(name: str) -> None:
    [[plain, moved]] = run_ranks(
        run_both, 1, name, EXAMPLES[name].arguments, timeout_seconds=TIMEOUT
    )

    assert [
        key for key in plain[1] | moved[1] if not torch.equal(plain[1][key], moved[1][key])
    ] == []
    assert score(name, moved[0]) == score(name, plain[0])


# ---- two processes -------------------------------------------------------------------------------


def run_under(name: str, strategy: str) -> tuple[str, dict[str, Tensor]]:
    return run_script(f"examples.{name}", *EXAMPLES[name].arguments, f"--strategy={strategy}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXAMPLES if EXAMPLES[name].strategies])
def test_moved_in_script_learns_on_two_processes(name: str) -> None:
    example = EXAMPLES[name]

    runs = [
        run_ranks(run_under, 2, name, strategy, timeout_seconds=TIMEOUT)[0]
        for strategy in example.strategies
    ]

    learnt = score(name, runs[0][0])
    assert learnt < example.learnt if example.lower else learnt > example.learnt
    for other in runs[1:]:
        for key, tensor in runs[0][1].items():
            torch.testing.assert_close(other[1][key], tensor, rtol=0, atol=example.tolerance)


@pytest.mark.slow
def test_language_model_on_two_processes_ends_with_the_weights_of_its_plain_version() -> None:
    [plain, moved], _ = run_ranks(
        run_both, 2, "gpt", EXAMPLES["gpt"].arguments, timeout_seconds=TIMEOUT
    )

    assert score("gpt", moved[0]) == pytest.approx(score("gpt", plain[0]), abs=1e-4)
    assert score("gpt", moved[0]) < EXAMPLES["gpt"].learnt
    assert plain[1].keys() == moved[1].keys()
    for key, tensor in plain[1].items():
        torch.testing.assert_close(moved[1][key], tensor, rtol=0, atol=1e-5)


def run_counted(module: str, *arguments: str) -> tuple[dict[str, Tensor], int, int]:
    """The weights, the micro-batches that were trained on, and the graphs that were compiled."""
    script: Any = importlib.import_module(module)
    loss, micro_batches = script.nats_per_byte, 0

    def counting(logits: Tensor, targets: Tensor) -> Tensor:
        nonlocal micro_batches
        micro_batches += torch.is_grad_enabled()
        value: Tensor = loss(logits, targets)
        return value

    torch._dynamo.utils.counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "nats_per_byte", counting)
        _, weights = run_script(module, *arguments)
    return weights, micro_batches, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def run_compiled_and_resumed() -> dict[str, tuple[dict[str, Tensor], int, int]]:
    """Both versions compiled, whole, and gone on with from their third step."""
    script: Any = importlib.import_module("examples.gpt")
    found = {}
    with pytest.MonkeyPatch.context() as patch:  # other tests run in this process, too
        patch.setattr(script, "ModelCheckpoint", lambda **_: ModelCheckpoint(every_n_train_steps=3))
        for name, saving in (("plain.gpt", ["--save-every=3"]), ("gpt", [])):
            run = partial(run_counted, f"examples.{name}", "--steps=4")
            found[f"{name} compiled"] = run("--compile=aot_eager")
            shutil.rmtree("runs", ignore_errors=True)
            found[f"{name} whole"] = run(*saving)
            for newest in Path("runs").glob("*/step-4"):
                shutil.rmtree(newest)
            found[f"{name} resumed"] = run(*saving, "--resume")
    return found


@pytest.mark.slow
def test_language_model_is_compiled_and_resumed_alike_in_plain_pytorch() -> None:
    [found] = run_ranks(run_compiled_and_resumed, 1, timeout_seconds=TIMEOUT)

    for name in ("plain.gpt", "gpt"):
        compiled, whole, resumed = (found[f"{name} {kind}"] for kind in KINDS)
        # Weights alone would be as equal if neither flag did anything.
        assert compiled[2] > 0
        assert [whole[2], resumed[2]] == [0, 0]
        assert [compiled[1], whole[1], resumed[1]] == [8, 8, 2]
        for key, tensor in found["plain.gpt whole"][0].items():
            assert torch.equal(whole[0][key], tensor), f"{name}: {key}"
            assert torch.equal(resumed[0][key], tensor), f"{name}: {key}"
            torch.testing.assert_close(compiled[0][key], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_unfreezing_is_refused_where_gradients_would_not_be_exchanged() -> None:
    with pytest.raises(RanksFailed, match=r"'ddp' does not provide 'params.may_unfreeze'"):
        run_ranks(run_under, 2, "finetuning", "ddp", timeout_seconds=TIMEOUT)


# ---- the page ------------------------------------------------------------------------------------


def code_lines(path: Path) -> list[str]:
    """A script without empty lines, comments and docstrings."""
    text = re.sub(r'^ *""".*?"""$', "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def changed(name: str) -> str:
    """How many lines of code went and came, of how many."""
    before = code_lines(ROOT / "examples" / "plain" / f"{name}.py")
    after = code_lines(ROOT / "examples" / f"{name}.py")
    signs = [line[0] for line in list(unified_diff(before, after, n=0))[2:]]
    return f"| {len(before)} | −{signs.count('-')} +{signs.count('+')} |"


@pytest.mark.parametrize("name", EXAMPLES)
def test_page_counts_the_lines_that_changed(name: str) -> None:
    [row] = [
        line
        for line in PAGE.read_text("utf-8").splitlines()
        if line.startswith("| ") and f"(../examples/{name}.py)" in line
    ]

    assert f"(../examples/plain/{name}.py)" in row
    assert changed(name) in row


def test_every_plain_script_is_tried_beside_its_moved_version() -> None:
    plain = {path.stem for path in ROOT.glob("examples/plain/*.py")}

    assert plain == set(EXAMPLES)
