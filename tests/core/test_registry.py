from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from torchweld import Claims, Component, Settings, hookimpl, use
from torchweld.claims import Phase
from torchweld.interfaces import RunFacts
from torchweld.plan import Plan
from torchweld.planning import make_plan
from torchweld.problems import Problem
from torchweld.registry import Registry

FACTS = RunFacts(2, 4, 4, 10, 100)


@dataclass(frozen=True)
class ShardOptions:
    stage: int = 1
    offload: bool = False


SHARD = Component(
    name="shard",
    summary="stages",
    build="nowhere:Shard",
    options=ShardOptions,
    presets={"shard_stage_3": {"stage": 3, "offload": True}},
)
MIX = Component(name="mix", summary="mixes", build="nowhere:Mix")


class Offers:
    """A plugin that offers what it is given."""

    def __init__(self, *surgeries: object, strategies: tuple[object, ...] = ()) -> None:
        self.surgeries = surgeries
        self.strategies = strategies

    @hookimpl
    def torchweld_surgeries(self) -> list[Any]:
        return list(self.surgeries)

    @hookimpl
    def torchweld_strategies(self) -> list[Any]:
        return list(self.strategies)


class Algorithm:
    """A foreign object: its ``apply`` has three arguments, so it is no surgery of ours."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def apply(self, event: object, state: object, logger: object) -> None:
        raise NotImplementedError


class Adopts:
    @hookimpl
    def torchweld_adopt(self, obj: object, phase: Phase) -> Component | None:
        if phase == "surgery" and isinstance(obj, Algorithm):
            return Component(name="algorithm", summary="adopted", build=lambda: obj)
        return None


def double(parts: Any, factor: int = 2) -> Any:
    return parts


def unreadable_claims(options: Any, settings: Settings) -> Claims:
    raise ZeroDivisionError


class Own:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def apply(self, parts: Any) -> Any:
        return parts


def digest(*surgery: object, plugins: tuple[object, ...] = ()) -> str:
    plan = make_plan(Registry(plugins), strategy="single", data="torch", surgery=surgery)
    assert not plan.has_errors, plan.explain()
    return plan.digest


def test_components_are_sorted_and_built_ins_come_by_the_same_hooks() -> None:
    registry = Registry({"b": Offers(MIX), "a": Offers(strategies=(SHARD,))})

    strategies = [item.component.name for item in registry.components("strategy")]

    assert strategies == ["ddp", "shard", "single"]
    assert registry.components("strategy")[0].origin.distribution == "torchweld"
    assert Registry(builtins=False).components("strategy") == ()


def test_a_preset_expands_and_an_option_of_the_user_wins() -> None:
    registry = Registry([Offers(strategies=(SHARD,))])

    plain, _ = registry.choose("shard_stage_3", "strategy")
    changed, problems = registry.choose(use("shard_stage_3", stage=2), "strategy")

    assert plain is not None
    assert plain.options == ShardOptions(3, True)
    assert changed is not None
    assert changed.options == ShardOptions(2, True)
    assert (changed.name, problems) == ("shard", [])


def test_an_unknown_name_lists_what_is_installed_and_suggests() -> None:
    _, problems = Registry([Offers(MIX)]).choose("mixx", "surgery")

    (problem,) = problems
    assert problem.code == "TW101"
    assert problem.what == "no surgery is called 'mixx'"
    assert problem.why == "installed: mix"
    assert problem.fix == "did you mean 'mix'?"


def test_our_own_distribution_is_named_for_a_name_that_is_not_installed() -> None:
    _, exact = Registry().choose("fsdp", "strategy")
    _, typo = Registry().choose("fdsp", "strategy")
    _, other = Registry().choose("horovod", "strategy")

    assert exact[0].fix == "it is in the distribution torchweld-fsdp"
    assert typo[0].fix == "did you mean 'fsdp'? it is in the distribution torchweld-fsdp"
    assert other[0].fix == ""


def test_a_name_of_another_phase_says_where_it_belongs() -> None:
    _, problems = Registry().choose("ddp", "surgery")

    assert problems[0].fix == "'ddp' is a strategy: strategy=ddp"


def test_one_name_from_two_plugins_is_an_error_only_when_selected() -> None:
    registry = Registry({"a": Offers(MIX), "b": Offers(Component("mix", "", "x:y"))})

    chosen, problems = registry.choose("mix", "surgery")

    assert chosen is None
    assert (problems[0].code, problems[0].who) == ("TW104", ("a", "b"))
    assert registry.choose("ddp", "strategy")[1] == []


def test_wrong_options_leave_a_choice_that_can_still_be_checked() -> None:
    registry = Registry([Offers(strategies=(SHARD,))])

    chosen, problems = registry.choose(use("shard", stge=2, offload=True), "strategy")

    assert chosen is not None
    assert chosen.options == ShardOptions(offload=True)
    assert [p.code for p in problems] == ["TW103"]


def test_an_unmet_need_is_named_with_what_is_installed() -> None:
    needy = Component("needy", "", "x:y", needs=["pluggy>=900", "nobody-has-this", "click"])

    _, problems = Registry([Offers(needy)]).choose("needy", "surgery")

    assert [p.code for p in problems] == ["TW106", "TW106"]
    assert problems[0].what.startswith("needy needs pluggy>=900, installed is 1.")
    assert problems[1].what == "needy needs nobody-has-this, which is not installed"
    assert "pip" not in problems[1].fix


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Component("", "", "x:y"), "is not a name"),
        (Component("a,b", "", "x:y"), "the command line cannot take"),
        (Component("a", "", "no_colon"), "neither 'module:object' nor callable"),
        (Component("a", "", "x:y", options=dict), "is not a frozen dataclass"),
        (Component("a", "", "x:y", needs=["not !! valid"]), "is no requirement"),
        (Component("a", "", "x:y", needs="torch"), "is not a list of requirements"),
        (Component("a", "", "x:y", claims=7), "neither Claims nor a function"),  # type: ignore[arg-type]  # the point
        (Component("a", "", "x:y", api="2"), "is not a number"),  # type: ignore[arg-type]  # the point
        (SimpleNamespace(name="a"), "of type SimpleNamespace, not Component"),
    ],
)
def test_a_faulty_component_is_recorded_and_the_next_one_is_kept(wrong: object, said: str) -> None:
    registry = Registry({"odd": Offers(wrong, MIX)})

    (broken,) = registry.broken
    assert said in broken.error
    assert [item.component.name for item in registry.components("surgery")] == ["mix"]


def test_a_component_given_directly_needs_no_registry() -> None:
    chosen, problems = Registry().choose(MIX, "surgery")

    assert problems == []
    assert chosen is not None
    assert chosen.component is MIX


def test_an_object_is_adopted_and_enters_the_digest_by_its_values() -> None:
    plugins = (Adopts(),)

    chosen, problems = Registry(plugins).choose(Algorithm(), "surgery", position=0)

    assert problems == []
    assert chosen is not None
    assert chosen.name == "algorithm"
    assert chosen.position is None
    assert isinstance(chosen.make(), Algorithm)
    assert digest(Algorithm(), plugins=plugins) == digest(Algorithm(), plugins=plugins)
    assert digest(Algorithm(), plugins=plugins) != digest(Algorithm(0.5), plugins=plugins)


def test_a_foreign_object_that_nobody_adopts_is_refused() -> None:
    _, problems = Registry().choose(Algorithm(), "surgery")

    (problem,) = problems
    assert problem.code == "TW101"
    assert "no installed plugin adopts" in problem.what
    assert "Algorithm" in problem.what


def test_a_class_instead_of_an_instance_says_so() -> None:
    _, problems = Registry([Adopts()]).choose(Algorithm, "surgery")

    assert problems[0].fix == "give an instance: Algorithm(...)"


def test_a_plugin_that_fails_on_a_strangers_object_is_a_warning() -> None:
    class Fragile:
        @hookimpl
        def torchweld_adopt(self, obj: Any, phase: Phase) -> Component | None:
            return obj.composer  # type: ignore[no-any-return]  # the point

    chosen, problems = Registry({"fragile": Fragile(), "good": Adopts()}).choose(
        Algorithm(), "surgery"
    )

    assert chosen is not None
    assert [(p.code, p.severity, p.who) for p in problems] == [("TW105", "warning", ("fragile",))]


def test_a_function_is_a_surgery_under_its_qualified_name() -> None:
    chosen, problems = Registry().choose(double, "surgery", position=3)

    assert problems == []
    assert chosen is not None
    assert chosen.name == f"{__name__}.double"
    assert chosen.position == 3
    assert chosen.make() is double


def test_an_own_object_enters_the_digest_by_its_values_not_its_address() -> None:
    assert digest(Own(1.0)) == digest(Own(1.0))
    assert digest(Own(1.0)) != digest(Own(2.0))
    assert digest(functools.partial(double, factor=2)) != digest(
        functools.partial(double, factor=3)
    )


def test_functions_keep_the_order_in_which_they_are_listed() -> None:
    registry = Registry()

    plan = make_plan(registry, strategy="single", data="torch", surgery=[Own(2.0), double])

    assert [c.name.rpartition(".")[2] for c in plan.surgeries] == ["Own", "double"]


def test_after_reaches_a_choice_through_use() -> None:
    chosen, _ = Registry().choose(use(double, after="mix"), "surgery")

    assert chosen is not None
    assert chosen.after == ("mix",)


@pytest.mark.parametrize("choice", [None, 3, object()])
def test_something_that_cannot_be_a_choice_says_what_can(choice: object) -> None:
    _, problems = Registry().choose(choice, "strategy")

    assert problems[0].code == "TW101"
    assert problems[0].why.startswith("a strategy is a name, use(...), a Component")


def test_offered_leaves_out_what_could_not_run() -> None:
    needy = Component("needy", "", "x:y", needs=["nobody-has-this"])
    newer = Component("newer", "", "x:y", api=99)
    silly = Component("silly", "", "x:y", claims=unreadable_claims)
    registry = Registry([Offers(MIX, needy, newer, silly)], builtins=False)

    assert [chosen.name for chosen in registry.offered(Settings())] == ["mix"]


class Checks(Offers):
    @hookimpl
    def torchweld_check_plan(self, plan: Plan, facts: RunFacts) -> list[Any]:
        return [Problem("TW601", "error", f"{facts.world_size} is too many")]


class BadChecks(Offers):
    @hookimpl
    def torchweld_check_plan(self, facts: RunFacts) -> list[Any]:
        raise ArithmeticError("boom")


def test_run_checks_are_asked_of_plugins_that_take_part() -> None:
    registry = Registry({"checks": Checks(MIX), "idle": BadChecks(Component("idle", "", "x:y"))})
    plan = make_plan(registry, strategy="single", data="torch", surgery="mix")

    problems = registry.check_plan(plan, FACTS)

    assert [p.what for p in problems] == ["2 is too many"]


def test_run_checks_that_raise_are_an_error_that_names_the_plugin() -> None:
    registry = Registry({"bad": BadChecks(MIX)})
    plan = make_plan(registry, strategy="single", data="torch", surgery="mix")

    (problem,) = registry.check_plan(plan, FACTS)

    assert (problem.code, problem.severity, problem.who) == ("TW105", "error", ("bad",))
    assert "ArithmeticError: boom" in problem.why


class Commands(Offers):
    @hookimpl
    def torchweld_commands(self) -> list[Any]:
        return ["convert"]


class BadCommands(Offers):
    @hookimpl
    def torchweld_commands(self) -> list[Any]:
        raise OSError("no home")


def test_commands_come_by_entry_point_and_failures_are_data() -> None:
    registry = Registry({"good": Commands(), "bad": BadCommands()})

    commands, broken = registry.gather_commands()

    assert commands == registry.commands() == {"good": ["convert"]}
    assert [(b.entry_point, b.error) for b in broken] == [
        ("bad", "torchweld_commands raised OSError: no home")
    ]


class Advises(Offers):
    @hookimpl
    def torchweld_doctor(self) -> list[str]:
        return ["no libopencv: apt-get install libopencv-dev"]


class AdvisesInNumbers(Offers):
    @hookimpl
    def torchweld_doctor(self) -> list[int]:
        return [1]


def test_what_a_machine_lacks_comes_by_entry_point_and_failures_are_data() -> None:
    registry = Registry({"good": Advises(), "odd": AdvisesInNumbers(), "quiet": Offers()})

    advice, broken = registry.gather_advice()

    assert advice == {"good": ["no libopencv: apt-get install libopencv-dev"]}
    assert [(b.entry_point, b.error) for b in broken] == [
        ("odd", "torchweld_doctor returned something else than lines of text")
    ]


def test_two_strategies_are_a_finding_of_the_plan() -> None:
    plan = make_plan(Registry(), strategy=["single", "ddp"], data="torch")

    assert "TW201" in [problem.code for problem in plan.problems]


def test_the_plan_shows_every_mistake_at_once() -> None:
    registry = Registry([Offers(MIX, strategies=(SHARD,))])

    plan = make_plan(
        registry, strategy=use("shard", stge=1), data="trch", surgery=["mixx", 3], strict=True
    )

    assert sorted(p.code for p in plan.problems) == ["TW101", "TW101", "TW101", "TW103"]


def test_claims_that_raise_are_an_error_of_the_plan() -> None:
    silly = Component("silly", "", "x:y", claims=unreadable_claims)

    plan = make_plan(Registry(), strategy="single", data="torch", surgery=silly)

    assert [p.code for p in plan.problems if p.severity == "error"] == ["TW105"]


def test_the_same_surgeries_in_another_order_are_the_same_plan() -> None:
    other = Component("other", "", "x:y", claims=Claims(edits="optimizer"))
    plugins = (Offers(MIX, other),)

    assert digest("mix", "other", plugins=plugins) == digest("other", "mix", plugins=plugins)
