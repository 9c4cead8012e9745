"""The frozen plan: its text, its JSON, its digest, and what processes compare."""

from __future__ import annotations

import enum
import functools
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.core.stand_ins import choose, chosen, surgery
from torchweld import Claims, Settings, use
from torchweld.components import Chosen, Component, Origin
from torchweld.errors import PlanError
from torchweld.identity import identity
from torchweld.plan import Plan
from torchweld.problems import Problem
from torchweld.resolve import resolve
from torchweld.resolving.explain import render_problems

ARTICLE = chosen("channels_last", "label_smoothing", "cutmix", "blurpool", "ffcv", "deepspeed")
TWO = {"world>1": True}


def article(**more: Any) -> Plan:
    return resolve(ARTICLE, Settings(), facts=TWO, **more)


EXPLAINED = """\
plan {short}   2 processes   precision 32   0 problems

surgery   1 blurpool
          2 channels_last      after blurpool: replaced layers would lose the format
                               adjusted to weights=False, only the inputs become NHWC: deepspeed
                               lacks params.strided (it copies parameters into flat buffers)
          3 cutmix
          4 label_smoothing    after cutmix: smoothed first, a mixed target keeps half of it
data        ffcv               2 shards
strategy    deepspeed          owns backward, accumulation (1), clipping (off), step, precision (32)

checked at fit    core can see the loss (cutmix, label_smoothing) · inputs are 4-D (cutmix) · the
                  loss does not smooth labels itself (label_smoothing) · the loss takes soft targets
                  (cutmix, label_smoothing) · the model has convolutions (blurpool, channels_last)
settled for you   clipping is written as 0.0 (DeepSpeed clips at 1.0 when the key is absent)
"""


def test_explain_shows_order_reasons_adjustments_owners_and_open_checks() -> None:
    plan = article()

    assert plan.explain(world_size=2) == EXPLAINED.format(short=plan.digest[:6])


def test_a_plan_prints_as_one_line() -> None:
    plan = article()

    names = "blurpool, channels_last, cutmix, label_smoothing, ffcv, deepspeed"
    assert repr(plan) == f"<Plan {plan.short}: {names}>"


def test_explain_ends_with_the_problems() -> None:
    plan = resolve(chosen("cutmix", "mixup", "single"), Settings(), facts={"world>1": False})

    assert plan.explain().endswith(
        "TW302  cutmix and mixup cannot run together\n"
        "       why   both make soft targets (torchweld-composer 0.1.0)\n"
        "       fix   keep one of them: cutmix or mixup\n\n"
        "more on a code: torchweld explain TW302\n"
    )
    assert plan.explain().startswith(f"plan {plan.short}   1 process   precision 32   1 problem\n")


def test_explain_shows_settings_and_options_of_the_user() -> None:
    settings = Settings(precision="bf16", accumulate_grad_batches=4, gradient_clip_val=0.5)
    plan = resolve(chosen(use("ddp", bucket_cap_mb=50)), settings)

    assert "ddp                bucket_cap_mb=50   owns backward, accumulation (4)" in plan.explain()
    assert "clipping (norm 0.5), step, precision (bf16)" in " ".join(plan.explain().split())


def test_render_problems_says_that_nothing_was_started() -> None:
    error = Problem(
        "TW101", "error", "no surgery is called 'blurpol'", fix="did you mean 'blurpool'?"
    )
    warning = Problem("TW501", "warning", "blurpool changed nothing")

    assert render_problems([error, warning]) == (
        "nothing was started; 1 problem, 1 warning\n\n"
        "TW101  no surgery is called 'blurpol'\n"
        "       fix   did you mean 'blurpool'?\n"
        "TW501  warning: blurpool changed nothing\n"
        "more on a code: torchweld explain TW501"
    )


def test_raise_for_problems_raises_all_of_them_once() -> None:
    plan = resolve(chosen("cutmix", "mixup", "ema", "swa", "single"), Settings())

    with pytest.raises(PlanError) as caught:
        plan.raise_for_problems()

    assert [problem.code for problem in caught.value.problems] == ["TW201", "TW302"]
    assert str(caught.value).startswith("nothing was started; 2 problems\n")


def test_plan_without_errors_raises_nothing() -> None:
    plan = resolve([surgery("ant"), surgery("bee"), choose("single")], Settings())

    plan.raise_for_problems()

    assert [problem.severity for problem in plan.problems] == ["note"]


def test_plan_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        article().digest = "x"  # type: ignore[misc]  # that is what is tested


def test_json_has_stable_keys_and_plain_values() -> None:
    data = json.loads(article().to_json())

    assert sorted(data) == [
        "adjusted",
        "deferred",
        "digest",
        "edges",
        "facts",
        "order",
        "owned",
        "problems",
        "settings",
        "settled",
    ]
    assert data["order"][1] == {
        "phase": "surgery",
        "split": "",
        "name": "channels_last",
        "summary": "stand-in for channels_last",
        "distribution": "torchweld-composer",
        "version": "0.1.0",
        "options": {"weights": False},
    }
    assert data["edges"][0]["first"] == "blurpool"
    assert data["facts"] == {"world>1": True}


def test_properties_find_the_members_by_phase() -> None:
    plan = article()

    assert [member.name for member in plan.surgeries] == [
        "blurpool",
        "channels_last",
        "cutmix",
        "label_smoothing",
    ]
    assert (plan.strategy, plan.data, plan.val_data) == (ARTICLE[5], ARTICLE[4], None)


def test_plan_of_nothing() -> None:
    plan = resolve([], Settings())

    assert (plan.strategy, plan.data, plan.surgeries, plan.problems) == (None, None, (), ())
    assert plan.explain() == f"plan {plan.short}   precision 32   0 problems\n"


# Facts --------------------------------------------------------------------------------------------


def test_with_facts_decides_what_was_deferred() -> None:
    plan = article()

    later = plan.with_facts({"loss.visible": False})

    assert [problem.key for problem in later.problems] == [
        "TW301:cutmix",
        "TW301:label_smoothing",
    ]
    assert "loss.visible" not in {entry.token for entry in later.deferred}
    assert later.facts == {"world>1": True, "loss.visible": False}


def test_with_facts_keeps_allow_strict_given_problems_and_fixes() -> None:
    given = Problem("TW101", "warning", "something")
    members = chosen("cutmix", "single")
    plan = resolve(members, Settings(), problems=[given], allow=["TW301:cutmix"], strict=True)

    later = plan.with_facts({"inputs.4d": False})

    assert {(p.code, p.severity) for p in later.problems} == {
        ("TW101", "error"),
        ("TW301", "allowed"),
    }


def test_with_facts_starts_from_the_original_choices() -> None:
    plan = resolve(chosen("layer_freezing", "ddp"), Settings())

    assert plan.with_facts(TWO).adjusted == plan.adjusted


def test_digest_changes_with_facts_only_through_adaptation() -> None:
    plan = article()

    assert plan.with_facts({"inputs.4d": True}).digest == plan.digest


# Digest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "members",
    [
        chosen(use("cutmix", alpha=0.5), "single"),
        chosen("mixup", "single"),
        [replace(choose("cutmix"), origin=Origin("torchweld-composer", "0.2.0")), choose("single")],
        chosen("cutmix", "ddp"),
        [*chosen("cutmix", "single"), replace(choose("torch"), split="val")],
    ],
    ids=["option", "name", "version", "strategy", "validation"],
)
def test_digest_sees_names_versions_and_options(members: list[Chosen]) -> None:
    plan = resolve(chosen("cutmix", "single"), Settings())

    assert resolve(members, Settings()).digest != plan.digest


def test_digest_sees_settings() -> None:
    members = chosen("single")

    assert resolve(members, Settings()).digest != resolve(members, Settings(seed=1)).digest


def test_digest_sees_the_order_of_bare_functions() -> None:
    first, second = (replace(surgery(name), position=i) for i, name in enumerate("ab"))
    turned = [replace(first, position=1), replace(second, position=0)]

    assert resolve([first, second], Settings()).digest != resolve(turned, Settings()).digest


class Kind(enum.Enum):
    LINEAR = 1


class Policy:
    """Has the default repr, with a memory address in it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.cache = object()


@dataclass(frozen=True)
class Loose:
    policy: Any = None
    table: dict[str, Any] = field(default_factory=dict)


def loose(policy: Any, **table: Any) -> Chosen:
    component = Component("loose", "loose", lambda policy, table: None, Loose, Claims())
    return Chosen("surgery", component, Loose(policy, table))


def digest(policy: Any, **table: Any) -> str:
    return resolve([loose(policy, **table)], Settings()).digest


def test_digest_has_no_memory_addresses() -> None:
    assert digest(Policy(3)) == digest(Policy(3))
    assert digest([Policy(3), {"x": Policy(1)}]) == digest([Policy(3), {"x": Policy(1)}])
    assert digest(lambda: 1) == digest(lambda: 1)
    assert digest(functools.partial(Policy, 3)) == digest(functools.partial(Policy, 3))
    assert digest(Policy(3)) != digest(Policy(4))
    assert digest(functools.partial(Policy, 3)) != digest(functools.partial(Policy, 4))


def test_digest_ignores_the_order_of_mappings_and_sets() -> None:
    assert digest({"a", "b", "c"}, x=1, y=2) == digest({"c", "b", "a"}, y=2, x=1)
    assert digest(Kind.LINEAR) != digest(Kind)


def test_object_that_cannot_be_written_down_is_no_obstacle() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert digest(Rude()) == digest(Rude())


def test_object_that_contains_itself_is_no_obstacle() -> None:
    loop: list[Any] = []
    loop.append(loop)

    assert digest(loop) == digest(loop)


# Ranks --------------------------------------------------------------------------------------------


def test_summary_is_flat_text_whose_difference_is_readable() -> None:
    mine = resolve(chosen("cutmix", "single"), Settings()).summary()
    theirs = resolve(chosen(use("cutmix", alpha=0.5), "single"), Settings(seed=3)).summary()

    different = {key for key in mine if mine[key] != theirs[key]}

    assert different == {"digest", "1 surgery", "settings.seed"}
    assert "alpha=0.5" in theirs["1 surgery"]
    assert json.loads(json.dumps(mine)) == mine


PROGRAM = """
import sys
from tests.core.stand_ins import chosen
from torchweld import Settings
from torchweld.resolve import resolve
members = chosen("channels_last", "label_smoothing", "cutmix", "blurpool", "ffcv", "deepspeed")
print(resolve(members, Settings(), facts={"world>1": True}).digest, "torch" in sys.modules)
"""


@pytest.mark.parametrize("seed", ["0", "1"])
def test_digest_is_the_same_in_another_process_that_has_no_torch(seed: str) -> None:
    root = Path(__file__).parents[2]
    environ = {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{root}:{root / 'core' / 'src'}"}

    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, check=True
    )

    assert printed.stdout.split() == [article().digest, "False"]


class Remembering:
    """Keeps something of every step, as Composer's CutMix keeps its last box."""

    def __init__(self) -> None:
        self.alpha = 1.0
        self._last = 0.0


def test_identity_leaves_out_what_an_object_remembers() -> None:
    used = Remembering()
    used._last = 0.7

    assert identity(used) == identity(Remembering())
