"""What ``torchweld inspect`` says of resuming under a plan, beside what resuming then does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.core.distributions import Site
from tests.core.small_runs import SEED, fit, quiet_trainer, saved
from torchweld import use
from torchweld.checkpoint import Checkpoint
from torchweld.cli import main
from torchweld.errors import TorchweldError
from torchweld.testing import run_ranks

SAME = ("strategy=single", "data=torch:batch_size=4", f"seed={SEED}")

SURGERIES = """
from dataclasses import dataclass
from torchweld import Claims, Component, hookimpl

@dataclass(frozen=True)
class Sizes:
    width: int = 4

def claims(options, settings):
    return Claims(edits="model.modules")

@hookimpl
def torchweld_surgeries():
    return [
        Component("widens", "for a test", "torchweld_widen_impl:make", Sizes, claims),
        Component("scales", "for a test", "torchweld_widen_impl:scales",
                  claims=Claims(edits="batch.inputs")),
    ]
"""
IMPLEMENTATION = """
from dataclasses import replace
from torch import nn

def make(*, width):
    def widen(parts):
        parts.model.append(nn.Linear(3, width))
        return parts
    return widen

def scales():
    return lambda parts: replace(parts, input_transforms=(lambda inputs: 2 * inputs,))
"""


def inspect(path: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["inspect", str(path), *words])


def resume_report(path: Path, *words: str) -> dict[str, Any]:
    result = inspect(path, *words, "--json")
    assert result.exit_code in {0, 1}, result.output
    report = dict(json.loads(result.stdout)["resume"])
    assert report["possible"] is (result.exit_code == 0)
    return report


def changes(path: Path, *words: str) -> dict[str, tuple[str, str]]:
    """What changes, from what to what."""
    found = resume_report(path, *words)["changes"]
    return {c["what"]: (c["before"], c["now"]) for c in found if c["before"] != c["now"]}


def resumes(path: Path, **settings: Any) -> bool:
    """Whether a run of these settings really goes on from the checkpoint."""
    trainer = quiet_trainer(path.parent.parent, max_epochs=3, callbacks=[], **settings)
    try:
        fit(trainer, ckpt_path=path)
    except TorchweldError:
        return False
    return True


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The checkpoints of 12 steps in two epochs of 22 samples, by 4 on one process."""
    root = tmp_path_factory.mktemp("runs")
    fit(quiet_trainer(root))
    return saved(root)


def test_under_the_same_plan_nothing_changes(run: list[Path]) -> None:
    result = inspect(run[2], *SAME)

    assert result.exit_code == 0
    digest = Checkpoint.open(run[2]).header["plan_digest"][:6]
    assert f"can resume under plan {digest} on 1 process\n" in result.output
    assert result.output.rstrip().endswith("data position: batch 3 of epoch 1   exact")


def test_without_words_nothing_is_compared(run: list[Path]) -> None:
    assert "resume" not in json.loads(inspect(run[2], "--json").stdout)


def test_everything_that_changes_is_said(run: list[Path]) -> None:
    words = ("strategy=ddp", "data=torch:batch_size=2", "precision=bf16", "gradient_clip_val=1.0")

    assert changes(run[1], *words, "--world-size", "2") == {
        "data torch": ("batch_size=4", "batch_size=2"),
        "strategy": ("single", "ddp"),
        "gradient_clip_val": ("none", "1.0"),
        "precision": ("32", "bf16"),
        "processes": ("1", "2"),
        "seed": (str(SEED), "none"),
    }


def test_without_a_world_size_it_is_that_of_the_checkpoint(run: list[Path]) -> None:
    assert resume_report(run[0], *SAME)["world_size"] == 1


def test_without_a_batch_size_it_is_that_of_the_checkpoint(run: list[Path]) -> None:
    found = changes(run[1], "strategy=ddp", f"seed={SEED}", "--world-size", "2")

    assert found["samples a step"] == ("4", "8")
    assert found["data position"] == ("batch 2 of epoch 1", "batch 1 of epoch 1")


@pytest.mark.parametrize(
    ("step", "words", "settings", "possible"),
    [
        (3, (), {}, True),
        (3, ("accumulate_grad_batches=2",), {"accumulate_grad_batches": 2}, False),
        (4, ("accumulate_grad_batches=2",), {"accumulate_grad_batches": 2}, True),
        (3, ("data=torch:batch_size=6",), {"data": use("torch", batch_size=6)}, True),
        (4, ("data=torch:batch_size=6",), {"data": use("torch", batch_size=6)}, False),
        (6, ("data=torch:batch_size=5",), {"data": use("torch", batch_size=5)}, True),
        (3, ("precision=bf16",), {"precision": "bf16"}, True),
        (3, ("precision=bf16-true",), {"precision": "bf16-true"}, False),
        (3, ("seed=8",), {"seed": 8}, True),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_the_verdict_is_what_resuming_does(
    run: list[Path], step: int, words: tuple[str, ...], settings: Any, possible: bool
) -> None:
    keys = {word.partition("=")[0] for word in words}
    same = [word for word in SAME if word.partition("=")[0] not in keys]

    result = inspect(run[step - 1], *same, *words)

    assert (result.exit_code == 0) is possible, result.output
    assert resumes(run[step - 1], **settings) is possible


def _resumes_here(path: Path) -> bool:
    return resumes(path, strategy="ddp")


@pytest.mark.parametrize(("step", "possible"), [(3, False), (4, True)])
def test_the_verdict_for_two_processes_is_what_they_do(
    run: list[Path], step: int, possible: bool
) -> None:
    result = inspect(run[step - 1], "strategy=ddp", *SAME[1:], "--world-size", "2")

    assert (result.exit_code == 0) is possible, result.output
    assert run_ranks(_resumes_here, 2, run[step - 1]) == [possible] * 2


def test_a_refused_position_says_what_would_do(run: list[Path]) -> None:
    output = " ".join(inspect(run[2], *SAME, "accumulate_grad_batches=2").output.split())

    assert "would be refused under plan" in output
    assert "refused data position: batch 3 of epoch 1 -> none" in output
    assert "resume with a batch size, number of processes and accumulate_grad_batches" in output


def test_the_end_of_an_epoch_fits_every_batch_size(run: list[Path]) -> None:
    words = ("strategy=ddp", "data=torch:batch_size=5", "--world-size", "3")

    (position,) = (
        c for c in resume_report(run[5], *words)["changes"] if c["what"] == "data position"
    )

    assert position["now"] == "the beginning of epoch 2"
    assert (position["effect"], position["refused"]) == ("exact", False)


def test_data_without_a_length_has_windows_over_the_ends_of_epochs(tmp_path: Path) -> None:
    fit(quiet_trainer(tmp_path, data="torch", max_epochs=None, max_steps=3), data="stream")

    result = inspect(saved(tmp_path)[2], "data=torch", "accumulate_grad_batches=2")

    assert result.exit_code == 0, result.output


def test_a_plan_that_cannot_run_is_refused_with_its_problems(run: list[Path]) -> None:
    result = inspect(run[2], "strategy=single", "--world-size", "2")

    assert result.exit_code == 1
    assert "TW302" in result.output
    assert "would be refused" in result.output


@pytest.mark.parametrize("words", [("strategi=ddp",), ("ddp",)])
def test_words_that_are_no_plan_exit_with_2(run: list[Path], words: tuple[str, ...]) -> None:
    assert inspect(run[2], *words).exit_code == 2


# ---- surgeries -----------------------------------------------------------------------------------


@pytest.fixture
def surgeries(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that changes the model, and one that does not; and a user's module."""
    site.plugin("widen", source=SURGERIES)
    (site.path / "torchweld_widen_impl.py").write_text(IMPLEMENTATION)
    (tmp_path / "nets_of_here.py").write_text("from tests.core.small_runs import make_model\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets_of_here", raising=False)


@pytest.fixture
def widened(surgeries: None, tmp_path: Path) -> Path:
    """A checkpoint of a run with both."""
    fit(quiet_trainer(tmp_path / "runs", max_epochs=1, surgery=["widens", "scales"]))
    return saved(tmp_path / "runs")[2]


MODEL = ("--model", "nets_of_here:make_model")
CASES: dict[str, tuple[Any, bool, bool]] = {
    "surgery=widens,scales": (["widens", "scales"], True, True),
    "surgery=widens": (["widens"], True, True),
    "surgery=scales": (["scales"], False, False),
    "surgery=scales,widens:width=5": ([use("widens", width=5), "scales"], False, False),
}
"""Words, the same for a Trainer, whether it can be resumed, and what is known without a model."""


@pytest.mark.parametrize("words", CASES)
@pytest.mark.parametrize("model", [(), MODEL], ids=["words", "model"])
def test_surgeries_that_change_the_model_are_refused(
    words: str, model: tuple[str, ...], widened: Path
) -> None:
    surgery, possible, known = CASES[words]

    result = inspect(widened, *SAME, words, *model)

    assert (result.exit_code == 0) is (possible if model else known), result.output
    assert resumes(widened, surgery=surgery) is possible


def test_a_surgery_that_may_change_the_model_is_asked_about(widened: Path) -> None:
    output = " ".join(inspect(widened, *SAME, "surgery=scales").output.split())

    assert "refused surgery widens: with -> without" in output
    assert "give --model pkg:make to know" in output


def test_with_the_model_it_is_known_that_nothing_changed(surgeries: None, tmp_path: Path) -> None:
    fit(quiet_trainer(tmp_path / "runs", max_epochs=1))
    path = saved(tmp_path / "runs")[2]

    found = resume_report(path, *SAME, *MODEL)

    assert found["possible"] is True
    assert [c["what"] for c in found["changes"]] == ["data position"]


def test_another_model_is_refused(surgeries: None, run: list[Path], tmp_path: Path) -> None:
    (tmp_path / "nets_of_here.py").write_text(
        "from torch import nn\ndef make_model(): return nn.Linear(6, 3)\n"
    )

    result = inspect(run[2], *SAME, *MODEL)

    assert result.exit_code == 1
    assert "names, shapes or dtypes differ" in result.output


def test_another_version_of_a_component_is_said(widened: Path, site: Site) -> None:
    (old,) = site.path.glob("torchweld_widen-*.dist-info")
    text = (old / "METADATA").read_text().replace("Version: 1.0", "Version: 2.0")
    (old / "METADATA").write_text(text)

    found = changes(widened, *SAME, "surgery=widens,scales")

    assert found["surgery scales"] == ("version=torchweld-widen 1.0", "version=torchweld-widen 2.0")
