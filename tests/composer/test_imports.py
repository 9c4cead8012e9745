"""What importing does to a process; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "composer", "numpy")


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_listing_and_planning_import_nothing_heavy() -> None:
    code = f"""
import sys
import torchweld_composer
from torchweld.planning import make_plan
from torchweld.registry import Registry
registry = Registry({{"composer": torchweld_composer}})
surgery = ["cutmix", "blurpool", "label_smoothing", "channels_last"]
plan = make_plan(registry, strategy="single", data="torch", surgery=surgery)
plan.explain()
print(plan.problems, [name for name in {HEAVY!r} if name in sys.modules])
"""
    assert run_python(code) == "() []"


def test_building_a_surgery_leaves_handlers_random_state_logger_and_filters_alone() -> None:
    code = """
import logging, random, signal, warnings
import torch
def state():
    logger = logging.getLogger("torchmetrics")
    return (
        signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), random.getstate(),
        torch.get_rng_state().tolist(), list(warnings.filters), logger.level, logger.handlers[:],
    )
random.seed(1)
before = state()
from torchweld_composer.surgeries import label_smoothing
label_smoothing(smoothing=0.1)
import sys
assert "composer" in sys.modules
print([a == b for a, b in zip(before, state())])
"""
    assert run_python(code) == str([True] * 7)


def test_ctrl_c_is_still_a_keyboard_interrupt() -> None:
    code = """
import os, signal
from torchweld_composer.surgeries import label_smoothing
label_smoothing(smoothing=0.1)
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    print("KeyboardInterrupt")
"""
    assert run_python(code) == "KeyboardInterrupt"


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            raise {error}
sys.meta_path.insert(0, Block())
from torchweld.errors import PluginError
from torchweld_composer.surgeries import cutmix
try:
    cutmix(alpha=1.0, interpolate_loss=False, uniform_sampling=False)
except PluginError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (
            "composer",
            "ModuleNotFoundError('gone', name='composer')",
            ("no module named 'composer'",),
        ),
        (
            "torchvision",
            "RuntimeError('operator torchvision::nms does not exist')",
            ("operator torchvision::nms does not exist", "torchvision 0.22.0"),
        ),
    ],
)
def test_a_missing_or_broken_library_is_one_clear_error(
    name: str, error: str, words: tuple[str, ...]
) -> None:
    printed = run_python(BLOCK.format(name=name, error=error))

    assert [w for w in (*words, "torchweld-composer[mosaicml]") if w not in printed] == []
