"""Ninety-one combinations whose verdict is known, and that the listing never matters."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from tests.core.stand_ins import choose
from torchweld import Settings, Use, use
from torchweld.components import Chosen, CompileOptions
from torchweld.plan import Plan
from torchweld.resolve import resolve


class Row(NamedTuple):
    choices: list[str | Use]
    facts: str
    verdict: str
    codes: str = ""
    settings: Settings = Settings()


CAST = Settings(precision="bf16-true")
COMPILED = Settings(compile=CompileOptions())
CPU = Settings(accelerator="cpu")
Z3 = use("deepspeed", stage=3)
Z3_INIT = use("deepspeed", stage=3, init=True)
VALUE, ADAPTIVE = (use("gradient_clipping", type=kind) for kind in ("value", "adaptive"))
BLOCK = use("stochastic_depth", method="block")
SAME_SEED = use("stochastic_depth", method="block", same_seed=True)
QUASI = use("ffcv", order="quasi_random")
ARTICLE: list[str | Use] = ["channels_last", "label_smoothing", "cutmix", "blurpool", "ffcv"]

ROWS = [
    # What Composer's algorithms allow, by strategy.
    Row(["blurpool", "fsdp"], "world>1", "ok"),
    Row(["blurpool", "deepspeed"], "world>1", "ok"),
    Row(["blurpool", Z3], "world>1", "ok"),
    Row(["blurpool", Z3_INIT], "world>1", "refused", "TW202"),
    Row(["channels_last", "fsdp"], "world>1", "adjusted"),
    Row(["channels_last", "deepspeed"], "world>1", "adjusted"),
    Row(["channels_last", Z3], "world>1", "adjusted"),
    Row(["channels_last", "ddp"], "world>1", "ok"),
    Row(["channels_last", "oss"], "world>1", "adjusted"),
    Row(["channels_last", "blurpool", "single"], "", "ordered"),
    Row(["channels_last", "factorize", "single"], "", "ordered"),
    Row(["weight_standardization", "blurpool", "single"], "", "ordered"),
    Row(["blurpool", "ghost_batchnorm", "single"], "", "ok"),
    Row(["cutmix", "mixup", "single"], "", "refused", "TW302"),
    Row(["label_smoothing", "cutmix", "single"], "", "ordered"),
    Row(["cutmix", "label_smoothing", "single"], "", "ok"),
    Row(
        [use("cutmix", interpolate_loss=True), "label_smoothing", "single"], "", "refused", "TW302"
    ),
    Row(["label_smoothing", "single"], "loss.smooths", "refused", "TW302"),
    Row(["cutmix", "single"], "not loss.accepts_soft_targets", "refused", "TW301"),
    Row(["label_smoothing", "single"], "not loss.visible", "refused", "TW301"),
    Row(["cutmix", "single"], "not inputs.4d", "refused", "TW301"),
    Row(["ema", "fsdp"], "world>1", "ok"),
    Row(["ema", "deepspeed"], "world>1", "ok"),
    Row(["ema", Z3], "world>1", "refused", "TW301"),
    Row(["swa", "fsdp"], "world>1", "refused", "TW301"),
    Row(["swa", Z3], "world>1", "refused", "TW301"),
    Row(["ema", "swa", "single"], "", "refused", "TW201"),
    Row(["ema", "blurpool", "single"], "", "ok"),
    Row(["ema", "layer_freezing", "single"], "", "ok"),
    Row(["sam", "fsdp"], "world>1", "ok"),
    Row(["sam", "oss"], "world>1", "refused", "TW301"),
    Row(["sam", "deepspeed"], "world>1", "refused", "TW301"),
    Row(["sam", Z3], "world>1", "refused", "TW301"),
    Row(["sam", "single"], "", "refused", "TW302", Settings(precision="16")),
    Row(["sam", "gradient_clipping", "single"], "", "adjusted"),
    Row(["gradient_clipping", "deepspeed"], "world>1", "adjusted"),
    Row([ADAPTIVE, "deepspeed"], "world>1", "refused", "TW301"),
    Row([VALUE, "deepspeed"], "world>1", "refused", "TW301"),
    Row([VALUE, "fsdp"], "world>1", "ok"),
    Row([ADAPTIVE, "fsdp"], "world>1", "refused", "TW301"),
    Row([VALUE, "oss"], "world>1", "refused", "TW301"),
    Row(["gradient_clipping", "single"], "", "refused", "TW203", Settings(gradient_clip_val=0.5)),
    Row(["layer_freezing", "ddp"], "world>1", "adjusted"),
    Row(["layer_freezing", use("ddp", find_unused_parameters=True)], "world>1", "ok"),
    Row(["layer_freezing", "fsdp"], "world>1", "ok"),
    Row(["layer_freezing", "deepspeed"], "world>1", "refused", "TW301"),
    Row(["layer_freezing", "oss"], "world>1", "refused", "TW301"),
    Row([BLOCK, "fsdp"], "world>1", "refused", "TW301"),
    Row([BLOCK, "ddp"], "world>1", "adjusted"),
    Row(["stochastic_depth", "fsdp"], "world>1", "ok"),
    Row([SAME_SEED, "fsdp"], "world>1", "ok"),
    Row([BLOCK, "deepspeed"], "world>1", "refused", "TW301"),
    # Data sources, runs and models.
    Row(
        ["progressive_resizing", "single", use("ffcv", resolution_schedule=True)],
        "",
        "refused",
        "TW302",
    ),
    Row(["single", QUASI], "", "ok"),
    Row(["ddp", QUASI], "world>1", "refused", "TW302"),
    Row(["randaugment", "single", "ffcv"], "", "refused", "TW301"),
    Row(["randaugment", "single", "torch"], "", "ok"),
    Row(["progressive_resizing", "selective_backprop", "single"], "not model.batchnorm", "ordered"),
    Row(["selective_backprop", "single"], "model.batchnorm", "ok+warn", "TW302"),
    Row(["progressive_resizing", "single"], "", "ok+warn", "TW302", COMPILED),
    Row(["low_precision_layernorm", "single"], "", "ok+warn", "TW301", CPU),
    Row(["fsdp", "deepspeed"], "world>1", "refused", "TW201"),
    Row(["single", "torch", "ffcv"], "", "refused", "TW201"),
    Row(["single"], "world>1", "refused", "TW302"),
    # Strangers, most of whom declare nothing.
    Row(["lora", "fsdp"], "world>1", "ok"),
    Row(["lora", Z3_INIT], "world>1", "refused", "TW202"),
    Row(["sam", "diloco"], "world>1", "refused", "TW301"),
    Row(["typo", "single"], "", "refused", "TW102"),
    Row(["ema", "diloco"], "world>1", "refused", "TW301"),
    Row(["channels_last", "diloco"], "world>1", "adjusted"),
    Row([ADAPTIVE, "diloco"], "world>1", "refused", "TW301"),
    Row(["layer_freezing", "diloco"], "world>1", "refused", "TW301"),
    Row(["single", "parquet", "ffcv"], "", "refused", "TW201"),
    Row(["single", "parquet"], "", "ok"),
    Row(["lora", "fsdp", "parquet"], "world>1", "ok"),
    Row(["randaugment", "single", "parquet"], "", "refused", "TW301"),
    Row(["diloco", "fsdp"], "world>1", "refused", "TW201"),
    Row(["cutmix", "label_smoothing", "diloco", "parquet"], "world>1", "ok"),
    Row(["gradient_clipping", "diloco"], "world>1", "adjusted"),
    Row(["sam", "lora", "fsdp"], "world>1", "ok"),
    Row(["channels_last", "lora", "single"], "", "ok"),
    Row(["lora", "layer_freezing", "single"], "", "ok"),
    # Precision: autocast keeps parameters, bf16-true casts them.
    Row(["blurpool", "fsdp"], "world>1", "refused", "TW301", CAST),
    Row(["blurpool", "fsdp"], "world>1", "ok", "", Settings(precision="bf16")),
    Row(["blurpool", "ddp"], "world>1", "ok"),
    Row(["blurpool", "deepspeed"], "world>1", "refused", "TW301", CAST),
    Row(["fsdp"], "world>1, model.batchnorm", "refused", "TW302", CAST),
    Row(["fsdp"], "world>1, model.batchnorm", "ok"),
    Row(["blurpool", "diloco"], "world>1", "refused", "TW301"),
    # The article's stack.
    Row([*ARTICLE, "deepspeed"], "world>1", "adjusted"),
    Row([*ARTICLE, "fsdp"], "world>1", "adjusted"),
]


def label(row: Row) -> str:
    names = [c if isinstance(c, str) else f"{c.name}{dict(c.options)}" for c in row.choices]
    return " + ".join([*names, row.facts, row.settings.precision])


def facts_of(row: Row) -> dict[str, bool]:
    words = [word.strip() for word in row.facts.split(",") if word]
    return {word.removeprefix("not "): not word.startswith("not ") for word in words}


def resolved(row: Row, chosen: list[Chosen]) -> Plan:
    return resolve(chosen, row.settings, facts=facts_of(row))


def verdict_of(plan: Plan, listed: list[str]) -> str:
    """What the plan comes to for somebody who listed the choices in this order."""
    severities = {problem.severity for problem in plan.problems}
    turned = any(listed.index(edge.first) > listed.index(edge.then) for edge in plan.edges)
    outcomes = [
        ("refused", plan.has_errors),
        ("ok+warn", "warning" in severities),
        ("adjusted", bool(plan.adjusted)),
        ("ordered", turned),
    ]
    return next((verdict for verdict, found in outcomes if found), "ok")


def test_there_are_ninety_one_rows() -> None:
    assert len(ROWS) == 91


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_verdict_is_the_known_one(row: Row) -> None:
    chosen = [choose(choice) for choice in row.choices]

    plan = resolved(row, chosen)

    severe = {p.code for p in plan.problems if p.severity in {"error", "warning"}}
    assert (verdict_of(plan, [c.name for c in chosen]), " ".join(severe)) == (
        row.verdict,
        row.codes,
    )


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_plan_is_the_same_for_any_listing(row: Row) -> None:
    chosen = [choose(choice) for choice in row.choices]
    plan = resolved(row, chosen)

    for seed in range(5):
        shuffled = random.Random(seed).sample(chosen, len(chosen))
        other = resolved(row, shuffled)

        assert other == plan
        assert other.explain() == plan.explain()
        assert other.to_json() == plan.to_json()


@pytest.mark.parametrize("row", [r for r in ROWS if r.verdict == "refused"], ids=label)
def test_every_refusal_says_why_and_who(row: Row) -> None:
    plan = resolved(row, [choose(choice) for choice in row.choices])

    for problem in plan.problems:
        assert problem.why
        assert problem.who
