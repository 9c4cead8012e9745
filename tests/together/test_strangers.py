"""Distributions that nobody here has heard of take part in the matrix, without a word about them.

They are written into a folder beside the installed ones: a strategy that declares nothing, a
surgery that edits targets, and one whose claims are untrue.
"""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tests.core.distributions import Site
from tests.together.matrix import Bench
from tests.together.matrix_choices import Cell

QUIET = dedent("""
    from torchweld import Component, hookimpl

    QUIET = Component(name="quiet", summary="averages gradients", build="quiet_strategy:make")

    @hookimpl
    def torchweld_strategies():
        return [QUIET]
""")
QUIET_STRATEGY = dedent("""
    from torchweld.strategies.ddp import DdpStrategy

    def make():
        return DdpStrategy(find_unused_parameters=False, static_graph=False, bucket_cap_mb=25)
""")
SHIFT = dedent("""
    from torchweld import Claims, Component, Rel, hookimpl

    SHIFT = Component(
        name="shift_targets",
        summary="calls every class by the name of the next",
        build="shift_surgery:make",
        claims=Claims(
            edits="batch.targets",
            requires=Rel("loss.visible", "it changes targets before the loss"),
            before=Rel("targets.smoothed", "it counts classes, which smoothed targets are not"),
        ),
    )

    @hookimpl
    def torchweld_surgeries():
        return [SHIFT]
""")
SHIFT_SURGERY = dedent("""
    from dataclasses import replace

    def shifted(outputs, targets):
        return (targets + 1) % outputs.shape[1]

    def apply(parts):
        return replace(parts, target_transforms=(*parts.target_transforms, shifted))

    def make():
        return apply
""")
UNTRUE = dedent("""
    from torchweld import Claims, Component, hookimpl

    UNTRUE = Component(
        name="untrue",
        summary="says that it edits targets, and halves weights",
        build="untrue_surgery:make",
        claims=Claims(edits="batch.targets"),
    )

    @hookimpl
    def torchweld_surgeries():
        return [UNTRUE]
""")
UNTRUE_SURGERY = dedent("""
    import torch

    def apply(parts):
        with torch.no_grad():
            for weight in parts.model.parameters():
                weight.mul_(0.5)
        return parts

    def make():
        return apply
""")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The matrix's own judge; processes that it starts find the three beside ours."""
    site = Site(tmp_path / "site")
    for name, listing, module, code in (
        ("quiet", QUIET, "quiet_strategy", QUIET_STRATEGY),
        ("shift", SHIFT, "shift_surgery", SHIFT_SURGERY),
        ("untrue", UNTRUE, "untrue_surgery", UNTRUE_SURGERY),
    ):
        modules = {f"torchweld_{name}_of_nobody": listing, module: code}
        entry = f"[torchweld]\n{name} = torchweld_{name}_of_nobody\n"
        site.install(f"torchweld-{name}-of-nobody", entry_points=entry, modules=modules)
    monkeypatch.setattr(sys, "path", [*sys.path, str(site.path)])
    return Bench(str(tmp_path / "beton"))


@pytest.mark.slow
def test_a_strategy_that_declares_nothing_runs_what_cannot_be_wrong(bench: Bench) -> None:
    rows = [
        bench.judge(Cell("quiet", surgeries=surgeries))
        for surgeries in ((), ("cutmix", "label_smoothing"), ("channels_last",))
    ]

    assert [row.verdict for row in rows] == ["ok", "ordered", "adjusted"]
    assert [row.agrees for row in rows] == [True, True, True], rows


@pytest.mark.slow
def test_a_strategy_that_declares_nothing_is_refused_where_it_could_be_wrong(
    bench: Bench,
) -> None:
    """This one is DDP, so it would be right: the judge says so, and it has to say so itself."""
    for surgery in ("ema", "sam"):
        row = bench.judge(Cell("quiet", surgeries=(surgery,)))

        assert (row.verdict, row.agrees) == ("refused", False)
        assert "quiet" in row.why
        assert row.happened == "forced: the same bits as by hand; nothing went wrong"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed stage 2", "quiet"])
def test_a_surgery_that_edits_targets_trains_under_every_strategy(
    strategy: str, bench: Bench
) -> None:
    alone = bench.judge(Cell(strategy, surgeries=("shift_targets",)))
    ordered = bench.judge(Cell(strategy, surgeries=("label_smoothing", "shift_targets")))

    assert (alone.verdict, alone.agrees) == ("ok", True), alone
    assert (ordered.verdict, ordered.agrees) == ("ordered", True), ordered


@pytest.mark.slow
def test_a_surgery_whose_claims_are_untrue_is_named_before_step_1(bench: Bench) -> None:
    row = bench.judge(Cell(surgeries=("untrue",)))

    assert not row.agrees
    assert "TW502 untrue changed 'model', which it does not claim" in row.happened
