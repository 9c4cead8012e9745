"""Every checkpoint to every strategy on one, two and four ranks: 240 pairs, for ``nox -s soak``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed.runs import (
    bench_of,
    case_of,
    components,
    different,
    largest_difference,
    steps_of,
)
from tests.deepspeed.test_state import load, saved_by, states
from torchweld.testing.strategy_session import Case, Step

SOURCES = ("ddp", "zero1", "zero2", "zero3")
TARGETS = tuple(name for name in sorted(components()) if name != "single")
MODELS = ("mlp", "frozen", "convnet", "gpt")
TOLERANCE = 1e-7
"""Of weights after one more step, whose gradients other ranks add up in another order."""

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], Any]:
    """A checkpoint of each source on two ranks, what was in it, and what came after a step."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        (model, source): (path, saved_by(source, 2, path, model))
        for model in MODELS
        for source in SOURCES
        for path in (folder / f"{model}-{source}",)
    }


def load_each(case: Case, dirty: Step, after: Step, paths: list[str]) -> list[Any]:
    return [load(case, dirty, after, path) for path in paths]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_each_source_is_read_bitwise_and_goes_on(
    written: Any, model: str, target: str, world_size: int
) -> None:
    bench = bench_of(target, world_size)
    dirty, after = steps_of(model, (1,) * 5)[-1], steps_of(model)[-1]
    case = case_of(bench, model, seed=9)
    paths: list[Path] = [written[model, source][0] for source in SOURCES]

    by_rank = bench.run(load_each, case, dirty, after, list(map(str, paths)))

    for source, found in zip(SOURCES, zip(*by_rank, strict=True), strict=True):
        saved, continued = written[model, source][1]
        loaded, resumed = states(found)
        apart = largest_difference(resumed, continued)
        print(f"{model}: {source} on 2 -> {target} on {world_size}: {apart:.2g}")
        assert different(loaded, saved) == [], source
        same = source == target and world_size == 2
        assert apart <= (0.0 if same else TOLERANCE), source
