"""The example that the README begins with, in small: one training, two strategies, a table."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

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
