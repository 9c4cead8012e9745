"""What the resolver finds, adapts and orders, beside the known verdicts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.core.stand_ins import STAND_INS, choose, chosen, strategy, surgery
from torchweld import Adapt, Claims, Rel, Settings, use
from torchweld.components import Chosen, CompileOptions, Component
from torchweld.errors import InvalidArgument
from torchweld.plan import Plan
from torchweld.problems import Problem
from torchweld.resolve import resolve

ALONE = {"world>1": False}
TWO = {"world>1": True}


def plan_of(*members: Chosen, **more: Any) -> Plan:
    return resolve(members, more.pop("settings", Settings()), **more)


def severe(plan: Plan) -> list[str]:
    return [p.key for p in plan.problems if p.severity in {"error", "warning"}]


def the(plan: Plan, code: str) -> Problem:
    (problem,) = [p for p in plan.problems if p.code == code]
    return problem


def names(plan: Plan) -> list[str]:
    return [member.name for member in plan.order]


def bare(name: str, position: int, **more: Any) -> Chosen:
    return replace(surgery(name, **more), position=position)


# Strangers ----------------------------------------------------------------------------------------

NEEDY = {
    "blurpool",
    "ema",
    "layer_freezing",
    "sam",
    "swa",
    "stochastic_depth",
    "gradient_clipping",
    "channels_last",
}
RISKY = {
    "stochastic_depth": use("stochastic_depth", method="block"),
    "gradient_clipping": use("gradient_clipping", type="adaptive"),
}


@pytest.mark.parametrize("name", sorted(NEEDY))
def test_strategy_that_declares_nothing_is_refused_or_adjusted(name: str) -> None:
    member = choose(RISKY.get(name, name))

    plan = plan_of(strategy("silent"), member, facts=TWO)

    assert plan.has_errors or plan.adjusted


def test_strategies_that_declare_nothing_own_engine_and_precision() -> None:
    plan = plan_of(strategy("silent"), choose("ddp"), facts=TWO)

    problem = the(plan, "TW201")
    assert problem.what == "ddp and silent both own engine and precision"


def test_surgery_that_declares_nothing_edits_the_modules() -> None:
    plan = plan_of(surgery("silent"), choose(use("deepspeed", stage=3, init=True)), facts=TWO)

    assert severe(plan) == ["TW202:deepspeed+silent"]


def test_data_source_that_declares_nothing_owns_the_loader() -> None:
    plan = plan_of(*chosen("parquet", "torch", "single"))

    assert severe(plan) == ["TW201:parquet+torch"]


# Owners and splits --------------------------------------------------------------------------------


def test_each_split_may_have_a_data_source_of_its_own() -> None:
    val = replace(choose("torch"), split="val")

    plan = plan_of(*chosen("ffcv", "single"), val)

    assert not plan.problems
    assert (plan.data, plan.val_data) == (choose("ffcv"), val)


def test_loader_of_validation_does_not_serve_training() -> None:
    val = replace(choose("torch"), split="val")

    plan = plan_of(*chosen("ffcv", "single", "randaugment"), val)

    assert severe(plan) == ["TW301:ffcv+randaugment"]


def test_owner_of_the_optimizer_comes_after_its_editors() -> None:
    owner = surgery("a_owner", Claims(owns="optimizer", edits=()))

    plan = plan_of(owner, *chosen("sam", "single"))

    assert names(plan) == ["sam", "a_owner", "single"]
    assert "edited before its owner" in plan.edges[0].reason


def test_loader_cannot_be_edited_before_there_is_one() -> None:
    plan = plan_of(surgery("early", Claims(edits="data.loader")), *chosen("torch", "single"))

    problem = the(plan, "TW202")
    assert "the surgery comes before the data" in problem.why


# Facts: yes, no, not known yet --------------------------------------------------------------------


def test_unknown_facts_are_deferred_not_refused() -> None:
    plan = plan_of(*chosen("label_smoothing", "single"), facts=ALONE)

    assert not plan.problems
    assert [(d.component, d.relation) for d in plan.deferred] == [
        ("label_smoothing", "loss.accepts_soft_targets"),
        ("label_smoothing", "loss.visible"),
        ("label_smoothing", "not loss.smooths"),
    ]
    assert {d.token for d in plan.deferred} == {
        "loss.accepts_soft_targets",
        "loss.visible",
        "loss.smooths",
    }


@pytest.mark.parametrize(
    ("accelerator", "expected"), [("cpu", ["TW301:kernel"]), ("cuda", []), ("auto", [])]
)
def test_accelerator_decides_the_device_while_planning(
    accelerator: Any, expected: list[str]
) -> None:
    kernel = surgery("kernel", Claims(requires="device.cuda"))

    plan = plan_of(kernel, choose("single"), settings=Settings(accelerator=accelerator))

    assert severe(plan) == expected
    assert ("device.cuda" in {d.token for d in plan.deferred}) == (accelerator == "auto")


def test_pending_adaptation_is_deferred() -> None:
    member = surgery(
        "norm", Claims(adapts=Adapt({"on": True}, "it pays", when="device.cuda")), options=Switch()
    )

    plan = plan_of(member, choose("single"), facts=ALONE)
    later = plan.with_facts({"device.cuda": True})

    assert [(d.relation, d.reason) for d in plan.deferred] == [("when device.cuda", "it pays")]
    assert later.adjusted[0].text == "adjusted to on=True, it pays: training runs on CUDA"


def test_own_word_does_not_count_against_oneself() -> None:
    assert not plan_of(*chosen("cutmix", "single")).problems


def test_own_word_does_not_fulfil_ones_own_requirement() -> None:
    claims = Claims(provides="loader.torch", requires="loader.torch")

    plan = plan_of(surgery("hopeful", claims), *chosen("ffcv", "single"))

    assert severe(plan) == ["TW301:ffcv+hopeful"]


def test_component_can_make_a_fit_fact_hold() -> None:
    soft = surgery("soft_loss", Claims(edits="loss.fn", provides="loss.accepts_soft_targets"))

    plan = plan_of(soft, *chosen("cutmix", "single"), facts={"loss.accepts_soft_targets": False})

    assert not plan.problems


def test_nothing_is_said_about_a_strategy_that_is_missing() -> None:
    given = Problem("TW101", "error", "no strategy is called 'fdsp'", who=("fdsp",))

    plan = plan_of(*chosen("blurpool", "ema", "channels_last"), problems=[given])

    assert plan.problems == (given,)
    assert not plan.adjusted


def test_fact_under_an_unknown_name_is_an_error_of_the_caller() -> None:
    with pytest.raises(InvalidArgument, match=r"'loss.visble'.*did you mean 'loss.visible'"):
        plan_of(facts={"loss.visble": True})


def test_missing_fact_names_what_is_the_case() -> None:
    plan = plan_of(*chosen("cutmix", "single"), facts={"inputs.4d": False})

    assert the(plan, "TW301").what == "cutmix needs inputs.4d, but inputs are not 4-D"


# Adaptation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Switch:
    on: bool = False
    level: int = 1


def test_adapted_options_reach_the_order_and_the_choices_stay() -> None:
    plan = plan_of(*chosen("channels_last", "fsdp"), facts=TWO)

    assert plan.surgeries[0].options.weights is False
    assert plan.choices == tuple(chosen("channels_last", "fsdp"))
    assert plan.adjusted[0].component == "channels_last"
    assert plan.adjusted[0].text == (
        "adjusted to weights=False, only the inputs become NHWC: "
        "fsdp lacks params.strided (it lays each shard out anew)"
    )


def test_adaptation_wins_over_an_option_of_the_users_and_says_so() -> None:
    claims = Claims(adapts=Adapt({"level": 3}, "it must", unless="params.strided"))

    plan = plan_of(surgery("stranger", claims, options=Switch(level=2)), choose("fsdp"))

    assert plan.surgeries[0].options.level == 3
    assert "level=3 instead of your level=2" in plan.adjusted[0].text


def test_adaptations_chain_to_a_fixed_point() -> None:
    def second(options: Switch, _: Settings) -> Claims:
        return Claims(
            provides="graph.random" if options.on else (),
            requires="graph.per_rank",
            adapts=Adapt({"on": True}, "so it must", unless="params.strided"),
        )

    stranger = surgery("stranger", second, options=Switch())
    flat = replace(choose("ddp"), component=replace(choose("ddp").component, claims=_flat_ddp))

    plan = plan_of(stranger, flat, facts=TWO)

    assert [entry.component for entry in plan.adjusted] == ["stranger", "ddp"]
    assert not plan.has_errors


def _flat_ddp(options: Any, settings: Settings) -> Claims:
    claims = choose("ddp").component.claims
    assert callable(claims)
    provided = [word for word in claims(options, settings).provides if word != "params.strided"]
    return replace(claims(options, settings), provides=provided)


def test_adapt_that_the_options_refuse_is_a_problem_of_the_plugin() -> None:
    claims = Claims(adapts=Adapt({"onn": True}, "typo", when="world>1"))

    plan = plan_of(surgery("stranger", claims, options=Switch()), choose("ddp"), facts=TWO)

    assert severe(plan) == ["TW103:stranger"]


def test_setting_asked_for_by_a_component_is_shown_and_used() -> None:
    plan = plan_of(*chosen("gradient_clipping", "single"), facts=ALONE)

    assert plan.settings.gradient_clip_val == 1.0
    assert plan.adjusted == (
        ("gradient_clipping", "sets gradient_clip_val=1.0 in core: core clips by norm"),
    )


def test_setting_that_agrees_with_the_user_is_no_change() -> None:
    plan = plan_of(*chosen("gradient_clipping", "single"), settings=Settings(gradient_clip_val=1.0))

    assert not plan.problems
    assert not plan.adjusted


def test_two_components_that_want_two_values() -> None:
    other = surgery("other", Claims(edits=(), sets=[("gradient_clip_val", 2.0, "it is wild")]))

    plan = plan_of(other, *chosen("gradient_clipping", "single"))

    assert the(plan, "TW203").what == (
        "gradient_clipping asks for gradient_clip_val=1.0, other asks for gradient_clip_val=2.0"
    )


def test_claims_are_read_again_under_a_setting_that_changed() -> None:
    casts = surgery("casts", Claims(edits=(), sets=[("precision", "bf16-true", "small")]))

    plan = plan_of(casts, *chosen("blurpool", "single"), facts=ALONE)

    assert severe(plan) == ["TW301:blurpool+single"]


# Order --------------------------------------------------------------------------------------------


def test_bare_functions_keep_the_order_of_the_list() -> None:
    plan = plan_of(bare("zebra", 0), bare("ant", 2), choose("single"))

    assert names(plan) == ["zebra", "ant", "single"]
    assert plan.edges == (("zebra", "ant", "listed in this order"),)
    assert not plan.problems


def test_two_functions_of_one_name_both_run() -> None:
    plan = plan_of(bare("<lambda>", 1), bare("<lambda>", 0), choose("single"))

    assert [member.position for member in plan.surgeries] == [0, 1]
    assert not plan.problems


def test_component_chosen_twice_is_refused() -> None:
    plan = plan_of(*chosen("blurpool", "blurpool", "single"))

    assert the(plan, "TW203").what == "'blurpool' is chosen twice"


def test_after_adds_an_edge_of_the_users_own() -> None:
    plan = plan_of(surgery("ant", after=("zebra",)), surgery("zebra"), choose("single"))

    assert names(plan) == ["zebra", "ant", "single"]
    assert plan.edges == (("zebra", "ant", "you asked for it (after=)"),)


def test_after_an_unknown_name_suggests_one() -> None:
    plan = plan_of(surgery("ant", after=("blurpol",)), *chosen("blurpool", "single"))

    problem = the(plan, "TW101")
    assert (problem.severity, problem.fix) == ("error", "did you mean 'blurpool'?")


def test_after_another_phase_is_refused_unless_it_is_always_so() -> None:
    impossible = plan_of(surgery("ant", after=("single",)), choose("single"))
    needless = plan_of(surgery("ant"), replace(choose("single"), after=("ant",)))

    assert the(impossible, "TW403").severity == "error"
    assert the(needless, "TW403").severity == "note"


def test_provider_comes_before_whoever_requires_it() -> None:
    zebra = surgery("zebra", Claims(provides="lora:adapters"))

    plan = plan_of(surgery("ant", Claims(requires="lora:adapters")), zebra, choose("single"))

    assert names(plan) == ["zebra", "ant", "single"]


def test_cycle_is_reported_with_every_reason_and_still_has_an_order() -> None:
    ant = surgery("ant", Claims(after=Rel("bee", "reason one")))
    bee = surgery("bee", Claims(after=Rel("cow", "reason two")))
    cow = surgery("cow", Claims(after=Rel("ant", "reason three")))

    plan = plan_of(ant, bee, cow, surgery("dog", Claims(after="cow")), choose("single"))

    problem = the(plan, "TW401")
    assert problem.who == ("ant", "bee", "cow")
    assert all(reason in problem.why for reason in ("reason one", "reason two", "reason three"))
    assert sorted(names(plan)) == ["ant", "bee", "cow", "dog", "single"]


def test_unordered_edits_get_one_note_for_a_pair() -> None:
    edits = Claims(edits=["batch.inputs", "batch.targets"])

    plan = plan_of(surgery("bee", edits), surgery("ant", edits), choose("single"))

    problem = the(plan, "TW402")
    assert problem.severity == "note"
    assert problem.what.startswith("ant and bee both edit batch.inputs and batch.targets")
    assert problem.why.endswith("ant, then bee")


@pytest.mark.parametrize(
    "members",
    [
        [surgery("ant", distribution="one"), surgery("bee", distribution="one")],
        [surgery("ant"), surgery("bee", after=("ant",))],
        [
            surgery("ant"),
            surgery("bee", Claims(edits=(), after="ant")),
            surgery("cow", Claims(edits="model.modules", after="bee")),
        ],
        [surgery("ant"), surgery("bee", Claims(edits="optimizer"))],
    ],
    ids=["one author", "an edge", "a path", "two slots"],
)
def test_no_note_where_the_order_is_settled(members: Sequence[Chosen]) -> None:
    assert not plan_of(*members, choose("single")).problems


# Broken claims ------------------------------------------------------------------------------------


def _raises(options: Any, settings: Settings) -> Claims:
    raise RuntimeError("no such stage")


def _exits(options: Any, settings: Settings) -> Claims:
    raise SystemExit(3)


@pytest.mark.parametrize(
    "claims",
    [
        _raises,
        _exits,
        lambda options, settings: None,
        Claims(requires=[3]),  # type: ignore[list-item]  # a stranger's mistake
        Claims(provides=[None]),  # type: ignore[list-item]  # a stranger's mistake
        Claims(sets=[("precision",)]),  # type: ignore[list-item]  # a stranger's mistake
    ],
    ids=["raises", "exits", "returns nothing", "a number", "None", "too short"],
)
def test_unreadable_claims_of_a_chosen_component_are_a_problem(claims: Any) -> None:
    plan = plan_of(surgery("stranger", claims), *chosen("blurpool", "single"))

    assert severe(plan) == ["TW105:stranger"]


def test_unreadable_claims_of_others_disturb_nobody() -> None:
    offered = [strategy("broken", _raises), choose("ddp")]

    plan = plan_of(*chosen("ema", use("deepspeed", stage=3)), facts=TWO, offered=offered)

    assert severe(plan) == ["TW301:deepspeed+ema"]
    assert "take strategy ddp instead of deepspeed" in the(plan, "TW301").fix


@pytest.mark.parametrize(
    ("claims", "fix"),
    [
        (Claims(owns="weights.averag"), "did you mean 'weights.average'?"),
        (Claims(provides="target.soft"), "did you mean 'targets.soft'?"),
        (Claims(lacks={"params.stride": "why"}), "did you mean 'params.strided'?"),
        (Claims(adapts=Adapt({}, "why", unless="params.stride")), "did you mean 'params.strided'?"),
        (Claims(before="targets.smoothd"), "did you mean 'targets.smoothed'?"),
        (Claims(sets=[("precison", "16", "why")]), "did you mean 'precision'?"),
    ],
    ids=["owns", "provides", "lacks", "adapts", "before", "sets"],
)
def test_unknown_word_in_claims_is_found_with_a_suggestion(claims: Claims, fix: str) -> None:
    problem = the(plan_of(surgery("stranger", claims), choose("single")), "TW102")

    assert problem.who == ("stranger",)
    assert problem.fix.startswith(fix)


# Allow, strict, fixes -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["TW302:cutmix+mixup", "TW302:mixup+cutmix"])
def test_allowed_finding_stays_visible_and_stops_nothing(key: str) -> None:
    plan = plan_of(*chosen("cutmix", "mixup", "single"), allow=[key])

    assert [(p.key, p.severity) for p in plan.problems] == [("TW302:cutmix+mixup", "allowed")]
    assert not plan.has_errors
    assert "you allowed it: TW302:cutmix+mixup" in plan.explain()


def test_allow_that_matches_nothing_is_a_warning_with_a_suggestion() -> None:
    plan = plan_of(*chosen("cutmix", "mixup", "single"), allow=["TW302:cutmix+mixp"])

    problem = the(plan, "TW103")
    assert problem.severity == "warning"
    assert problem.fix == "did you mean 'TW302:cutmix+mixup'?"


def test_allow_of_what_is_decided_at_fit_waits() -> None:
    members = chosen("cutmix", "single")
    plan = plan_of(*members, allow=["TW301:cutmix", "TW601:ema"])

    later = plan.with_facts({"inputs.4d": False})

    assert not plan.problems
    assert [p.severity for p in later.problems] == ["allowed"]


def test_missing_component_cannot_be_allowed() -> None:
    given = Problem("TW101", "error", "no surgery is called 'blurpol'", who=("blurpol",))

    plan = plan_of(choose("single"), problems=[given], allow=["TW101:blurpol"])

    assert plan.has_errors
    assert the(plan, "TW103").what == "allow='TW101:blurpol' cannot be allowed"


def test_strict_turns_warnings_into_errors_and_leaves_notes() -> None:
    members = [*chosen("progressive_resizing", "single"), surgery("ant"), surgery("bee")]

    plan = plan_of(*members, settings=Settings(compile=CompileOptions()), strict=True)

    assert [(p.code, p.severity) for p in plan.problems] == [("TW302", "error"), ("TW402", "note")]


def test_symmetrical_findings_are_one() -> None:
    assert len(plan_of(*chosen("cutmix", "mixup", "single")).problems) == 1


def test_several_missing_capabilities_of_one_pair_are_one_finding() -> None:
    problem = the(plan_of(*chosen("sam", "deepspeed"), facts=TWO), "TW301")

    assert problem.what == (
        "sam needs grads.elementwise and step.closure, which deepspeed does not provide"
    )
    assert "deepspeed lacks step.closure: its step takes no closure" in problem.why
    assert "deepspeed does not state that each process holds the finished gradient" in problem.why


def test_fixes_are_changes_that_a_second_resolution_accepts() -> None:
    offered = chosen("ddp", "single", "fsdp", "oss", "deepspeed", "torch")

    plan = plan_of(
        *chosen("sam", "channels_last", "torch", "deepspeed"), facts=TWO, offered=offered
    )

    # Not single (two processes) and not oss (it lacks grads.elementwise).
    assert the(plan, "TW301").fix == (
        "take strategy ddp or fsdp instead of deepspeed, or leave out sam"
    )


def test_fix_of_the_claim_itself_comes_first() -> None:
    member = surgery("x", Claims(requires=Rel("grads.whole", "norms", fix="use scale instead")))

    assert the(plan_of(member, choose("fsdp"), offered=chosen("ddp")), "TW301").fix == (
        "use scale instead"
    )


def test_fixes_are_found_beside_other_errors() -> None:
    plan = plan_of(*chosen("cutmix", "mixup", "ema", "swa", "single"))

    assert the(plan, "TW201").fix == "keep one of them: ema or swa"
    assert the(plan, "TW302").fix == "keep one of them: cutmix or mixup"


# Properties ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Odd:
    table: dict[str, object] = field(default_factory=dict)
    thing: object = field(default_factory=object)


def random_choice(rng: random.Random) -> list[Chosen]:
    count = rng.randint(1, 9)
    members = rng.sample(sorted(STAND_INS), count)
    after = [
        use(name, after=rng.sample(members, min(count, rng.randint(0, 2)))) for name in members
    ]
    functions = [bare(f"f{rng.randint(0, 3)}", place) for place in range(rng.randint(0, 3))]
    return [*chosen(*after), *functions]


@pytest.mark.parametrize("seed", range(150))
def test_any_set_in_any_order_is_one_plan(seed: int) -> None:
    rng = random.Random(seed)
    members = random_choice(rng)
    facts = {word: rng.random() < 0.5 for word in ("world>1", "loss.visible", "model.conv")}

    plan = plan_of(*members, facts=facts)
    other = plan_of(*rng.sample(members, len(members)), facts=facts)

    assert other == plan
    assert other.explain() == plan.explain()
    assert len(plan.order) == len(members)


@pytest.mark.parametrize("seed", range(150))
def test_order_honours_every_edge_unless_there_is_a_cycle(seed: int) -> None:
    plan = plan_of(*random_choice(random.Random(seed)))

    if "TW401" not in {problem.code for problem in plan.problems}:
        listed = names(plan)
        for edge in plan.edges:
            places = [
                (i, j)
                for i, first in enumerate(listed)
                for j, then in enumerate(listed)
                if first == edge.first and then == edge.then
            ]
            assert any(i < j for i, j in places)


def test_options_that_cannot_be_compared_are_no_obstacle() -> None:
    claims = Claims(adapts=Adapt({"table": {"b": 1}}, "why", when="world>1"))
    component = Component("odd", "odd", "x:y", Odd, claims)

    plan = plan_of(Chosen("surgery", component, Odd()), choose("ddp"), facts=TWO)

    assert plan.surgeries[0].options.table == {"b": 1}
