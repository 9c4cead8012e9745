"""compile= and activation_checkpointing= under every strategy: bitwise, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.unit_runs import compare
from torchweld import Trainer, use
from torchweld.testing import run_ranks

AGAIN: dict[str, Any] = {"activation_checkpointing": True}
BOTH: dict[str, Any] = {"compile": {}, **AGAIN}
ALIKE: Any = ([], {}, 3)
"""No weight and no metric differs; a graph for training, one for short batches, one without
gradients."""


@pytest.mark.parametrize(
    ("strategy", "improved", "found"),
    [
        ("ddp", [BOTH], [ALIKE]),
        ("fsdp", [AGAIN, BOTH], [([], {}, 0), ALIKE]),
        (use("deepspeed", stage=2), [BOTH], [ALIKE]),
        (use("deepspeed", stage=3, persistence_threshold=100), [AGAIN], [([], {}, 0)]),
        ("fairscale_oss", [BOTH], [ALIKE]),
        ("fairscale_sdp", [BOTH], [ALIKE]),
    ],
    ids=["ddp", "fsdp", "zero2", "zero3", "oss", "sdp"],
)
def test_two_ranks_train_bitwise_the_same(
    strategy: Any, improved: list[dict[str, Any]], found: list[Any]
) -> None:
    results = run_ranks(compare, 2, strategy, {}, improved, timeout_seconds=300.0)

    assert results == [found, found]


def test_stage_3_refuses_to_be_compiled() -> None:
    plan = Trainer(strategy=use("deepspeed", stage=3), compile=True).plan

    assert [(p.code, p.who) for p in plan.problems if p.severity == "error"] == [
        ("TW302", ("deepspeed",))
    ]
