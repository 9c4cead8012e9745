"""The language model of ``examples/gpt.py``: one word, one loss; and the same script elsewhere."""

from __future__ import annotations

import math
import re
from difflib import unified_diff
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from examples import gpt
from tests.together.test_docs import ROOT, run
from torchweld.testing import run_ranks

STEPS = 4
PEERS = ROOT / "examples" / "peers"
PAGE = ROOT / "docs" / "language-model.md"
PAIRS = {"by_hand": "torch", "with_lightning": "lightning", "with_accelerate": "accelerate"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


# ---- one word ------------------------------------------------------------------------------------


def _train(strategy: str, clip: float | None, folder: Path) -> dict[str, Tensor]:
    """Train as the example does; returns the exported weights and the validation loss."""
    train, val = gpt.load_data()
    trainer = gpt.make_trainer(strategy, STEPS, folder, clip=clip)
    gpt.fit(trainer, train, val)
    loss = trainer.evaluate(data=val)["loss"]
    weights = load_file(trainer.export(folder / f"{strategy}.safetensors"))
    return {**weights, "loss": torch.tensor(loss, dtype=torch.float64)}


def _train_both(clip: float | None, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return _train("ddp", clip, folder), _train("fsdp", clip, folder)


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], ...]:
    """What ``ddp`` and ``fsdp`` end with, clipping as the example does."""
    folder = tmp_path_factory.mktemp("clipped")
    both: tuple[dict[str, Tensor], ...]
    both = run_ranks(_train_both, 2, 1.0, folder, timeout_seconds=300)[0]
    return both


@pytest.mark.slow
def test_ddp_and_fsdp_end_alike_bitwise_without_clipping(tmp_path: Path) -> None:
    ddp, fsdp = run_ranks(_train_both, 2, None, tmp_path, timeout_seconds=300)[0]

    assert [name for name in ddp | fsdp if not torch.equal(ddp[name], fsdp[name])] == []


@pytest.mark.slow
def test_single_ddp_and_fsdp_end_with_the_same_loss(
    clipped: tuple[dict[str, Tensor], ...], tmp_path: Path
) -> None:
    ddp, fsdp = clipped

    [single] = run_ranks(_train, 1, "single", 1.0, tmp_path, timeout_seconds=300)

    # Sums of another order: over the halves of a batch, and over the pieces of the norm.
    torch.testing.assert_close(ddp["loss"], single["loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close(fsdp["loss"], ddp["loss"], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_run_of_ddp_goes_on_under_fsdp_and_writes_text(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "gpt.py")

    run(*TORCHRUN, script, "--strategy=ddp", "--steps=2", folder=tmp_path)
    done = run(*TORCHRUN, script, "--strategy=fsdp", "--steps=4", "--resume", folder=tmp_path)

    assert re.search(r"resumed \S+ at step 2\b", done.stdout)
    assert re.search(r"\ndef .*\nvalidation: \d\.\d{4} bits per byte\n$", done.stdout, re.DOTALL)
    assert set(shown("text").splitlines()) <= set(done.stdout.splitlines())


# ---- the same script elsewhere -------------------------------------------------------------------


def run_peer(name: str, *launcher: str, folder: Path) -> list[str]:
    """Run a script of ``examples/peers``; returns what it printed at its end."""
    if not find_spec(PAIRS[name.removesuffix("_fsdp")]):
        pytest.skip(f"needs {PAIRS[name.removesuffix('_fsdp')]}")
    (folder / "examples").symlink_to(ROOT / "examples")
    command = [*(launcher or ("-m",)), f"examples.peers.{name}", str(STEPS)]
    return run(*command, folder=folder).stdout.strip().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_script_for_one_process_runs(name: str, tmp_path: Path) -> None:
    printed = run_peer(name, folder=tmp_path)

    assert re.fullmatch(r"validation: \d\.\d{4} bits per byte", printed[-1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch reading its own checkpoint
def test_fsdp_by_hand_ends_with_our_weights(
    clipped: tuple[dict[str, Tensor], ...], tmp_path: Path
) -> None:
    ours = {name: tensor for name, tensor in clipped[1].items() if name != "loss"}

    run_peer("by_hand_fsdp", *TORCHRUN, "-m", folder=tmp_path)

    dcp_to_torch_save(tmp_path / "checkpoint", tmp_path / "checkpoint.pt")
    theirs = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_fsdp_with_lightning_ends_with_our_loss(
    clipped: tuple[dict[str, Tensor], ...], tmp_path: Path
) -> None:
    ours = clipped[1]["loss"].item() / math.log(2)

    printed = run_peer("with_lightning_fsdp", *TORCHRUN, "-m", folder=tmp_path)

    # It prints four digits.
    assert float(printed[-1].split()[1]) == pytest.approx(ours, abs=6e-5)


@pytest.mark.slow
def test_accelerate_trains_without_sharding_on_the_cpu_as_the_page_says(tmp_path: Path) -> None:
    printed = run_peer("with_accelerate_fsdp", *TORCHRUN, "-m", folder=tmp_path)

    assert printed[-2] == "DistributedType.MULTI_CPU"


@pytest.mark.slow
def test_lightnings_fsdp1_refuses_cpus_as_the_page_says(tmp_path: Path) -> None:
    if not find_spec("lightning"):
        pytest.skip("needs lightning")
    start = "lightning.Trainer(strategy='fsdp', accelerator='cpu')"
    script = f"import lightning\ntry:\n    {start}\nexcept ValueError as error:\n    print(error)"

    printed = run("-c", script, folder=tmp_path).stdout

    assert "requires a GPU accelerator" in printed


# ---- the page ------------------------------------------------------------------------------------


def shown(language: str) -> str:
    """The first block of a language on the page."""
    return PAGE.read_text("utf-8").partition(f"```{language}\n")[2].partition("```")[0]


def difference(name: str) -> str:
    """What tells the second script of a pair from the first, without the line that names it."""
    before, after = (
        (PEERS / f"{stem}.py").read_text("utf-8").splitlines()[1:]
        for stem in (name, f"{name}_fsdp")
    )
    lines = list(unified_diff(before, after, n=0, lineterm=""))[3:]
    return "\n".join("" if line.startswith("@@") else line for line in lines)


@pytest.mark.parametrize("name", PAIRS)
def test_page_shows_the_difference_of_two_scripts(name: str) -> None:
    assert f"```diff\n{difference(name)}\n```\n" in PAGE.read_text("utf-8")


@pytest.mark.parametrize("name", PAIRS)
def test_page_counts_the_lines_that_changed(name: str) -> None:
    lines = [(line[:1], line[1:].strip()) for line in difference(name).splitlines()]
    code = [sign for sign, text in lines if text and not text.startswith(("#", '"""'))]
    row = f"| +{code.count('+')} −{code.count('-')} |"

    table = PAGE.read_text("utf-8").partition("|---|")[2].partition("\n\n")[0].splitlines()

    assert row in table[list(PAIRS).index(name) + 2]
