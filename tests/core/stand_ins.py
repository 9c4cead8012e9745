"""Components that come later, and those of strangers, reduced to what they claim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchweld import Adapt, Claims, Component, Rel, Settings, Use
from torchweld.builtin import DDP, SINGLE, TORCH
from torchweld.claims import Phase
from torchweld.components import Chosen, Origin

CORE = Origin("torchweld", "0.1.0")
COMPOSER = Origin("torchweld-composer", "0.1.0")
NOTHING = Claims()
_MIXING = ("loss.visible", "loss.accepts_soft_targets", "inputs.4d")
_CAST = "bf16-true casts every parameter and buffer"


@dataclass(frozen=True)
class DeepspeedOptions:
    stage: int = 2
    init: bool = False


@dataclass(frozen=True)
class FfcvOptions:
    order: str = "random"
    resolution_schedule: bool = False


@dataclass(frozen=True)
class ChannelsLastOptions:
    weights: bool = True


@dataclass(frozen=True)
class MixOptions:
    alpha: float = 1.0
    interpolate_loss: bool = False


@dataclass(frozen=True)
class ClippingOptions:
    type: str = "norm"
    threshold: float = 1.0


@dataclass(frozen=True)
class DepthOptions:
    method: str = "sample"
    same_seed: bool = False


def _fsdp(_: None, settings: Settings) -> Claims:
    keeps = settings.precision != "bf16-true"
    provides = ["params.local", "params.writable", "params.may_freeze", "params.may_unfreeze"]
    provides += ["grads.elementwise", "step.closure", *(["precision.autocast"] if keeps else [])]
    return Claims(
        provides=provides,
        lacks={
            "params.strided": "it lays each shard out anew",
            "params.deepcopy": "a sharded module refuses deepcopy",
            **({} if keeps else {"precision.autocast": _CAST}),
        },
        forbids=[] if keeps else Rel("model.batchnorm", "BatchNorm fails on cast parameters"),
    )


def _deepspeed(options: DeepspeedOptions, settings: Settings) -> Claims:
    whole = ["params.local", "params.deepcopy"] if options.stage < 3 else []
    keeps = settings.precision != "bf16-true"
    return Claims(
        owns=["engine", "precision", *(["model.modules"] if options.init else [])],
        provides=[*whole, *(["precision.autocast"] if keeps else [])],
        lacks={
            "params.strided": "it copies parameters into flat buffers",
            "step.closure": "its step takes no closure",
            **({} if whole else {"params.local": "stage 3 keeps them empty outside of forward"}),
            **({} if keeps else {"precision.autocast": _CAST}),
        },
        settles=[("clipping is written as 0.0", "DeepSpeed clips at 1.0 when the key is absent")],
    )


def _ffcv(options: FfcvOptions, _: Settings) -> Claims:
    quasi = Rel("world>1", "quasi-random order reads every sample on every process")
    return Claims(
        provides=["loader.resizes"] if options.resolution_schedule else [],
        lacks={"loader.torch": "it has a loader of its own"},
        forbids=[quasi] if options.order == "quasi_random" else [],
    )


def _channels_last(options: ChannelsLastOptions, _: Settings) -> Claims:
    return Claims(
        edits=["model.modules", "batch.inputs"] if options.weights else ["batch.inputs"],
        requires="model.conv",
        after=Rel("weights.replaced", "replaced layers would lose the format"),
        adapts=Adapt({"weights": False}, "only the inputs become NHWC", unless="params.strided"),
    )


def _mix(options: MixOptions, _: Settings) -> Claims:
    smoothed = Rel("targets.smoothed", "an interpolated loss sees hard targets only")
    return Claims(
        edits=["batch.inputs", "batch.targets"],
        provides="targets.soft",
        requires=[Rel(word) for word in _MIXING],
        forbids=[
            Rel("targets.soft", "both make soft targets"),
            *([smoothed] if options.interpolate_loss else []),
        ],
        before=Rel("targets.smoothed", "smoothed first, a mixed target keeps half of it"),
    )


def _clipping(options: ClippingOptions, _: Settings) -> Claims:
    if options.type == "norm":
        sets = [("gradient_clip_val", options.threshold, "core clips by norm")]
        return Claims(edits=(), sets=sets)
    needed = {"value": "grads.elementwise", "adaptive": "grads.whole"}[options.type]
    return Claims(edits="grads", requires=Rel(needed, "it looks at gradients itself"))


def _stochastic_depth(options: DepthOptions, _: Settings) -> Claims:
    if options.method != "block" or options.same_seed:
        return Claims()
    return Claims(provides="graph.random", requires="graph.per_rank")


def _surgery(name: str, claims: Any = NOTHING, options: type | None = None) -> Component:
    return Component(name, f"stand-in for {name}", f"stand_ins:{name}", options, claims)


_COMPOSER = (
    _surgery(
        "blurpool",
        Claims(
            provides="weights.replaced",
            requires=["model.conv", "precision.autocast"],
            forbids=Rel("compile", "26 graph breaks", severity="warning"),
        ),
    ),
    _surgery("channels_last", _channels_last, ChannelsLastOptions),
    _surgery("cutmix", _mix, MixOptions),
    _surgery("mixup", _mix, MixOptions),
    _surgery(
        "label_smoothing",
        Claims(
            edits="batch.targets",
            provides="targets.smoothed",
            requires=["loss.visible", "loss.accepts_soft_targets"],
            forbids=Rel("loss.smooths", "smoothing twice is silent"),
        ),
    ),
    _surgery("ema", Claims(owns="weights.average", edits=(), requires="params.local")),
    _surgery("swa", Claims(owns="weights.average", edits=(), requires="params.deepcopy")),
    _surgery("factorize", Claims(provides="weights.replaced")),
    _surgery("ghost_batchnorm", Claims(requires="model.batchnorm")),
    _surgery("gradient_clipping", _clipping, ClippingOptions),
    _surgery(
        "layer_freezing",
        Claims(edits="optimizer", provides="params.freeze_midrun", requires="params.may_freeze"),
    ),
    _surgery(
        "low_precision_layernorm",
        Claims(
            requires=[
                Rel("precision.reduced", "it does nothing in fp32", severity="warning"),
                Rel("device.cuda", "its kernels are CUDA's", severity="warning"),
            ]
        ),
    ),
    _surgery(
        "progressive_resizing",
        Claims(
            edits="batch.inputs",
            forbids=[
                Rel("loader.resizes", "two schedules of one resolution"),
                Rel("compile", "every size is compiled anew", severity="warning"),
            ],
        ),
    ),
    _surgery("randaugment", Claims(edits=(), requires="loader.torch")),
    _surgery(
        "sam",
        Claims(
            edits="optimizer",
            requires=[
                Rel("step.closure", "it evaluates the loss twice a step"),
                Rel("grads.elementwise", "it moves along the gradient"),
            ],
            forbids=Rel("precision.fp16", "the scaler takes no closure"),
        ),
    ),
    _surgery(
        "selective_backprop",
        Claims(
            edits=["batch.inputs", "batch.targets"],
            requires="loss.visible",
            forbids=Rel("model.batchnorm", "statistics are updated twice", severity="warning"),
            before=["progressive_resizing", "targets.soft"],
        ),
    ),
    _surgery("stochastic_depth", _stochastic_depth, DepthOptions),
    _surgery("weight_standardization", Claims(after="weights.replaced")),
)
_STRANGERS: dict[Phase, tuple[Component, ...]] = {
    "surgery": (_surgery("lora"), _surgery("typo", Claims(edits="model.module"))),
    "data": (_surgery("parquet"),),
    "strategy": (_surgery("diloco"),),
}
_LATER: dict[Phase, tuple[Component, ...]] = {
    "data": (_surgery("ffcv", _ffcv, FfcvOptions),),
    "strategy": (
        _surgery("fsdp", _fsdp),
        _surgery("deepspeed", _deepspeed, DeepspeedOptions),
        _surgery(
            "oss",
            Claims(
                provides=[
                    "params.local",
                    "params.deepcopy",
                    "step.closure",
                    "precision.autocast",
                ]
            ),
        ),
    ),
}


def _all() -> dict[str, Chosen]:
    found: list[tuple[Phase, Component, Origin]] = [
        ("surgery", item, COMPOSER) for item in _COMPOSER
    ]
    found += [("strategy", item, CORE) for item in (SINGLE, DDP)] + [("data", TORCH, CORE)]
    for group in (_LATER, _STRANGERS):
        for phase, items in group.items():
            found += [(phase, item, Origin(f"torchweld-{item.name}", "0.1.0")) for item in items]
    return {
        item.name: Chosen(phase, item, item.options() if item.options else None, origin)
        for phase, item, origin in found
    }


STAND_INS = _all()
"""Every component by name, with default options."""


def choose(choice: str | Use) -> Chosen:
    """The component with these options, as a registry would choose it."""
    name, options, after = (
        (choice, {}, ()) if isinstance(choice, str) else (choice.name, choice.options, choice.after)
    )
    found = STAND_INS[str(name)]
    make: Callable[..., Any] | None = found.component.options
    made = make(**options) if make else None
    return Chosen(found.phase, found.component, made, found.origin, after)


def chosen(*choices: str | Use) -> list[Chosen]:
    """All of them."""
    return [choose(choice) for choice in choices]


def surgery(
    name: str,
    claims: Any = NOTHING,
    *,
    options: Any = None,
    distribution: str = "",
    after: Any = (),
) -> Chosen:
    """A stranger's surgery made for one test."""
    component = Component(name, name, f"strangers:{name}", type(options), claims)
    return Chosen("surgery", component, options, Origin(distribution, "1.0"), after)


def strategy(name: str, claims: Any = NOTHING) -> Chosen:
    """A stranger's strategy made for one test."""
    return Chosen("strategy", Component(name, name, f"strangers:{name}", None, claims))
