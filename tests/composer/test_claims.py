from __future__ import annotations

from importlib.metadata import requires
from itertools import permutations
from typing import Any

import pytest
from packaging.requirements import Requirement

import torchweld_composer
from tests.composer.small_nets import algorithm
from torchweld import Claims, Component, Settings, use
from torchweld.planning import make_plan
from torchweld.registry import Registry
from torchweld_composer.adopt import adopted_component

FOUR = ("blurpool", "channels_last", "cutmix", "label_smoothing")
REGISTRY = Registry({"composer": torchweld_composer})
FACTS = {
    "world>1": False,
    "loss.visible": True,
    "loss.accepts_soft_targets": True,
    "loss.smooths": False,
    "model.conv": True,
    "model.batchnorm": False,
    "inputs.4d": True,
    "targets.ignored": False,
    "device.cuda": False,
}


def plan_of(*surgery: Any, strategy: Any = "single", **settings: Any) -> Any:
    facts = {**FACTS, **settings.pop("facts", {})}
    return make_plan(
        REGISTRY,
        strategy=strategy,
        data="torch",
        surgery=surgery,
        settings=Settings(**settings),
        facts=facts,
    )


def codes(plan: Any, severity: str = "error") -> list[str]:
    return [p.code for p in plan.problems if p.severity == severity]


def order(plan: Any) -> list[str]:
    return [chosen.name for chosen in plan.surgeries]


@pytest.mark.parametrize("listed", list(permutations(FOUR)))
def test_any_order_of_the_four_is_the_same_plan(listed: tuple[str, ...]) -> None:
    plan = plan_of(*listed)

    assert order(plan) == list(FOUR)
    assert plan.digest == plan_of(*FOUR).digest
    assert plan.problems == ()


def test_the_plan_says_why_it_reordered() -> None:
    text = " ".join(
        plan_of("channels_last", "label_smoothing", "cutmix", "blurpool").explain().split()
    )

    assert "after blurpool: replaced layers would lose the format" in text
    assert "after cutmix: smoothed first, a mixed target keeps half of its hard part" in text


BARE = Component(
    name="bare", summary="a strategy that declares nothing", build="nothing:here", claims=Claims()
)


def test_channels_last_becomes_inputs_only_where_weights_have_no_strides() -> None:
    plan = plan_of("channels_last", strategy=BARE)

    assert codes(plan) == []
    (chosen,) = plan.surgeries
    assert chosen.options.weights is False
    assert "only the inputs become NHWC" in " ".join(plan.explain().split())


@pytest.mark.parametrize(
    ("surgery", "facts", "code"),
    [
        ("blurpool", {"model.conv": False}, "TW301"),
        ("channels_last", {"model.conv": False}, "TW301"),
        ("cutmix", {"inputs.4d": False}, "TW301"),
        ("cutmix", {"loss.visible": False}, "TW301"),
        ("cutmix", {"loss.accepts_soft_targets": False}, "TW301"),
        ("label_smoothing", {"loss.visible": False}, "TW301"),
        ("label_smoothing", {"loss.accepts_soft_targets": False}, "TW301"),
        ("label_smoothing", {"loss.smooths": True}, "TW302"),
        ("label_smoothing", {"targets.ignored": True}, "TW302"),
        ("cutmix", {"targets.ignored": True}, "TW302"),
    ],
)
def test_a_fact_that_would_break_it_is_an_error(
    surgery: str, facts: dict[str, bool], code: str
) -> None:
    assert codes(plan_of(surgery, facts=facts)) == [code]


def test_cutmix_by_loss_and_label_smoothing_are_refused() -> None:
    plan = plan_of("label_smoothing", use("cutmix", interpolate_loss=True))

    assert codes(plan) == ["TW302"]


def test_cutmix_by_loss_does_not_need_soft_targets() -> None:
    plan = plan_of(use("cutmix", interpolate_loss=True), facts={"loss.accepts_soft_targets": False})

    assert codes(plan) == []


@pytest.mark.parametrize("by_loss", [(False, False), (True, False), (False, True), (True, True)])
def test_cutmix_and_mixup_are_refused(by_loss: tuple[bool, bool]) -> None:
    first, second = by_loss
    mixup = algorithm("MixUp", interpolate_loss=second)

    assert codes(plan_of(use("cutmix", interpolate_loss=first), mixup)) == ["TW302"]


def test_two_label_smoothings_are_refused() -> None:
    plan = plan_of("label_smoothing", algorithm("LabelSmoothing", smoothing=0.2))

    assert "TW302" in codes(plan)


CASTS_WEIGHTS_ALONE = Component(
    name="halves", summary="casts parameters, no buffers", build="nothing:here", claims=Claims()
)


def test_blurpool_is_refused_where_weights_are_cast_alone() -> None:
    alone = plan_of("blurpool", strategy=CASTS_WEIGHTS_ALONE, precision="bf16-true")
    assert codes(alone) == ["TW301"]
    # ``single`` casts the filters as well.
    assert codes(plan_of("blurpool", precision="bf16-true")) == []
    assert codes(plan_of("blurpool", precision="bf16")) == []


@pytest.mark.filterwarnings("ignore:SWA has known issues")
def test_two_averages_are_ordered_and_warned_about() -> None:
    ema = algorithm("EMA", half_life="1ba")
    swa = algorithm("SWA", swa_start="0.3dur", swa_end="0.8dur", update_interval="1ba")

    for listing in ((ema, swa), (swa, ema)):
        plan = plan_of(*listing)

        assert codes(plan) == []
        assert codes(plan, "warning") == ["TW302"]
        assert order(plan) == ["ema", "swa"]


@pytest.mark.filterwarnings("ignore:GyroDropout is not implemented")
def test_gyro_dropout_is_refused_where_weights_are_cast() -> None:
    gyro = algorithm("GyroDropout", sigma=4, tau=2)

    assert codes(plan_of(gyro, precision="bf16-true")) == ["TW301"]
    assert codes(plan_of(gyro, precision="bf16")) == []


def test_blurpool_under_compile_is_a_warning() -> None:
    assert codes(plan_of("blurpool", compile=True), "warning") == ["TW302"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ProgressiveResizing", {}),
        ("SeqLengthWarmup", {"duration": 0.5, "min_seq_length": 4, "max_seq_length": 16}),
    ],
)
def test_sizes_that_change_under_compile_are_a_warning(
    name: str, arguments: dict[str, Any]
) -> None:
    obj = algorithm(name, **arguments)

    assert codes(plan_of(obj, compile=True)) == []
    assert codes(plan_of(obj, compile=True), "warning") == ["TW302"]
    assert codes(plan_of(obj), "warning") == []


@pytest.mark.filterwarnings("ignore:SAM has known issues")
def test_sam_under_loss_scaling_is_refused() -> None:
    assert codes(plan_of(algorithm("SAM"), precision="16")) == ["TW302"]
    assert codes(plan_of(algorithm("SAM"), precision="bf16")) == []


RESIZING_LOADER = Component(
    name="growing",
    summary="a loader whose images grow",
    build="nothing:here",
    claims=Claims(provides="loader.resizes"),
)


def test_two_schedules_of_the_resolution_are_refused() -> None:
    plan = make_plan(
        REGISTRY,
        strategy="single",
        data=RESIZING_LOADER,
        surgery=[algorithm("ProgressiveResizing")],
        facts=FACTS,
    )

    assert codes(plan) == ["TW302"]


def test_no_claim_of_the_plugin_is_misspelt() -> None:
    everything = [*FOUR, *ADOPTED.values()]

    for choice in everything:
        assert "TW102" not in codes(plan_of(choice))


ARGUMENTS: dict[str, dict[str, Any]] = {
    "EMA": {"half_life": "1ba"},
    "Alibi": {"max_sequence_length": 8},
}
PLAIN = (
    "MixUp",
    "CutOut",
    "ColOut",
    "RandAugment",
    "AugMix",
    "Factorize",
    "SqueezeExcite",
    "GhostBatchNorm",
    "WeightStandardization",
    "ProgressiveResizing",
    "SelectiveBackprop",
    "LayerFreezing",
    "LowPrecisionLayerNorm",
    "LowPrecisionGroupNorm",
    "NoOpModel",
    "SeqLengthWarmup",
)
ADOPTED = {name: algorithm(name, **ARGUMENTS.get(name, {})) for name in (*ARGUMENTS, *PLAIN)}


@pytest.mark.parametrize(
    "chain",
    [
        ("blurpool", "factorize", "weight_standardization", "channels_last"),
        ("blurpool", "squeeze_excite", "factorize", "channels_last"),
        (
            "selective_backprop",
            "progressive_resizing",
            "colout",
            "cutout",
            "mixup",
            "label_smoothing",
        ),
        (
            "selective_backprop",
            "progressive_resizing",
            "colout",
            "cutout",
            "cutmix",
            "label_smoothing",
        ),
    ],
)
def test_adopted_algorithms_come_in_the_canonical_order(chain: tuple[str, ...]) -> None:
    from torchweld_composer.known import KNOWN

    by_name = {entry.name: ADOPTED.get(name, entry.name) for name, entry in KNOWN.items()}
    chosen = [by_name[name] for name in chain]
    position = {name: place for place, name in enumerate(chain)}

    for listing in (chosen, chosen[::-1], sorted(chosen, key=str)):
        found = order(plan_of(*listing))
        assert sorted(found, key=position.__getitem__) == list(chain)
        assert _in_order(found, chain)


def _in_order(found: list[str], chain: tuple[str, ...]) -> bool:
    """Every pair that has a rule is in the order of the chain; the others may commute."""
    commuting = {
        frozenset({"channels_last", other})
        for other in ("squeeze_excite", "weight_standardization")
    }
    return all(
        found.index(first) < found.index(second) or frozenset({first, second}) in commuting
        for place, first in enumerate(chain)
        for second in chain[place + 1 :]
    )


@pytest.mark.parametrize(
    ("arguments", "settings", "expected"),
    [
        ({"clipping_type": "norm", "clipping_threshold": 1.0}, {}, []),
        (
            {"clipping_type": "norm", "clipping_threshold": 1.0},
            {"gradient_clip_val": 0.5},
            ["TW203"],
        ),
        ({"clipping_type": "value", "clipping_threshold": 1.0}, {}, []),
        ({"clipping_type": "adaptive", "clipping_threshold": 1.0}, {}, []),
    ],
)
def test_gradient_clipping_by_norm_is_cores_setting(
    arguments: dict[str, Any], settings: dict[str, Any], expected: list[str]
) -> None:
    plan = plan_of(algorithm("GradientClipping", **arguments), **settings)

    assert codes(plan) == expected
    if not expected and arguments["clipping_type"] == "norm":
        assert plan.settings.gradient_clip_val == 1.0


@pytest.mark.parametrize(
    "obj",
    [
        ("GradientClipping", {"clipping_type": "adaptive", "clipping_threshold": 1.0}),
        ("GradientClipping", {"clipping_type": "value", "clipping_threshold": 1.0}),
        ("EMA", {"half_life": "1ba"}),
        ("LayerFreezing", {}),
    ],
)
def test_a_strategy_that_declares_nothing_is_refused_where_it_could_be_wrong(
    obj: tuple[str, dict[str, Any]],
) -> None:
    name, arguments = obj

    assert "TW301" in codes(plan_of(algorithm(name, **arguments), strategy=BARE))


def test_layer_freezing_makes_ddp_look_for_unused_parameters() -> None:
    plan = plan_of(algorithm("LayerFreezing"), strategy="ddp", facts={"world>1": True})

    assert codes(plan) == []
    assert plan.strategy.options.find_unused_parameters is True
    assert "looks through the graph in every step" in " ".join(plan.explain().split())


def test_alibi_asks_for_the_transformers_that_composer_knows() -> None:
    asked = [Requirement(text) for text in adopted_component(ADOPTED["Alibi"]).needs]
    known = [Requirement(text) for text in requires("mosaicml") or ()]

    (ours,) = [r for r in asked if r.name == "transformers"]
    theirs = [r for r in known if r.name == "transformers"]
    assert theirs
    for version in ("4.11", "4.53.3", "4.54", "5.24.0"):
        assert ours.specifier.contains(version) is theirs[0].specifier.contains(version)


def test_what_the_components_need_is_what_the_extra_installs() -> None:
    extra = [
        Requirement(text)
        for text in requires("torchweld-composer") or ()
        if "extra ==" in text and text.startswith("mosaicml")
    ]
    (needed,) = {Requirement(text) for c in OFFERED for text in c.needs}

    (pin,) = (next(iter(r.specifier)).version for r in extra)
    assert needed.name == "mosaicml"
    assert pin in needed.specifier


OFFERED = torchweld_composer.torchweld_surgeries()
