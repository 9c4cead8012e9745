"""The example that the README begins with, in small: one training, two strategies, a table."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples import article
from tests.together.test_docs import ROOT, run

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ROW = re.compile(r"^(.+?) +(\d\.\d{3}) +([\d,]+) +([\d.]+) MB$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """One of the table."""

    accuracy: float
    rate: float
    megabytes: float


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("article")
    small = ["--images=500", "--epochs=4", "--root=small"]
    return run(*TORCHRUN, str(ROOT / "examples" / "article.py"), *small, folder=folder).stdout


def rows(printed: str) -> list[Row]:
    found = ROW.findall(printed)
    return [Row(float(a), float(rate.replace(",", "")), float(size)) for _, a, rate, size in found]


@pytest.mark.slow
def test_article_plans_trains_and_goes_on_under_another_strategy(printed: str) -> None:
    assert "adjusted to weights=False, only the inputs become NHWC" in printed
    assert "blurpool: 2 Conv2d -> BlurConv2d" in printed
    assert "float32 channels_last" in printed  # ffcv makes the images so
    assert re.search(r"resumed small/runs/.*/step-14 at step 14, epoch 3", printed)
    assert "epoch 4/4" in printed


@pytest.mark.slow
def test_article_ends_with_a_table_beside_plain_pytorch(printed: str) -> None:
    zero, fsdp, by_hand = rows(printed)

    assert min(row.rate for row in (zero, fsdp, by_hand)) > 0
    assert fsdp.megabytes < zero.megabytes < by_hand.megabytes
    assert min(fsdp.accuracy, by_hand.accuracy) > 0.2  # of ten classes, after a few steps


@pytest.mark.slow
def test_exported_weights_are_those_of_the_run(printed: str) -> None:
    exported = re.search(r"safetensors in a plain model: accuracy ([\d.]+)", printed)

    assert exported is not None
    # Of 100 images, which Pillow decodes and resizes a little differently.
    assert float(exported[1]) == pytest.approx(rows(printed)[1].accuracy, abs=0.05)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--epochs 1", "--epochs 1: two strategies train half each; give 2 or more"),
        ("--images 30", "--images 30: give a number from 250 to 1797"),
        ("--images 2000", "--images 2000: give a number from 250 to 1797"),
        ("--root taken", "--root taken: File exists; give a folder that can be written"),
        ("--rooot x", "unrecognized arguments: --rooot x"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    words: str,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["article.py", *words.split()])
    Path("taken").touch()

    with pytest.raises(SystemExit, match="2"):
        article.read_options()

    assert capsys.readouterr().err.endswith(f"article.py: error: {problem}\n")


def test_images_are_written_anew_after_an_interruption_and_with_every_digit(tmp_path: Path) -> None:
    left = tmp_path / f"jpeg-{article.FEWEST}.partial" / "train" / "another"
    left.mkdir(parents=True)

    train, val = article.load_images(*article.write_images(tmp_path, article.FEWEST))

    assert train.classes == val.classes == [str(digit) for digit in range(10)]
    assert len(train) + len(val) == article.FEWEST
    assert [path.name for path in tmp_path.iterdir()] == [f"jpeg-{article.FEWEST}"]
