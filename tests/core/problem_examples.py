"""One small plan for each code that the resolver finds; the pages print what these say."""

from __future__ import annotations

from collections.abc import Mapping

from tests.core.stand_ins import choose, chosen, surgery
from torchweld import Claims, Rel, Settings, use
from torchweld.components import Chosen
from torchweld.plan import Plan
from torchweld.problems import Problem
from torchweld.resolve import resolve

OFFERED = chosen("ddp", "single", "fsdp", "torch", "ffcv", "deepspeed")
DEFAULTS = Settings()
TWO = {"world>1": True}


def plan_of(
    *members: Chosen, settings: Settings = DEFAULTS, facts: Mapping[str, bool] = TWO
) -> Plan:
    return resolve(members, settings, facts=facts, offered=OFFERED)


def _raising(options: object, settings: Settings) -> Claims:
    raise KeyError("stage")


def example_plans() -> dict[str, Plan]:
    head = surgery("head", Claims(after=Rel("adapter", "it replaces what an adapter leaves")))
    adapter = surgery("adapter", Claims(after=Rel("head", "it wraps the head too")))
    crossed = surgery("crossed", Claims(after=Rel("ddp", "it wants the wrapped model")))
    z3_init = choose(use("deepspeed", stage=3, init=True))
    return {
        "TW101": plan_of(*chosen("blurpool", use("ema", after="blurpol"), "ddp")),
        "TW102": plan_of(*chosen("typo", "ddp")),
        "TW105": plan_of(surgery("lookahead", _raising), *chosen("ddp")),
        "TW201": plan_of(*chosen("ema", "swa", "ddp")),
        "TW202": plan_of(z3_init, *chosen("blurpool")),
        "TW203": plan_of(
            *chosen("gradient_clipping", "ddp"), settings=Settings(gradient_clip_val=0.5)
        ),
        "TW301": plan_of(*chosen("ema", use("deepspeed", stage=3))),
        "TW302": plan_of(*chosen("cutmix", "mixup", "ddp")),
        "TW401": plan_of(head, adapter, *chosen("ddp")),
        "TW402": plan_of(*chosen("blurpool", "lora", "ddp")),
        "TW403": plan_of(crossed, *chosen("ddp")),
    }


def example(code: str) -> Problem:
    """The only problem of this code in its example."""
    (problem,) = [p for p in example_plans()[code].problems if p.code == code]
    return problem
