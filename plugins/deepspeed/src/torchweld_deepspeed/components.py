"""The component ``deepspeed``: what it claims, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torchweld import Adapt, Claims, Component, Rel, Settings
from torchweld_deepspeed.config import find_notes
from torchweld_deepspeed.merging import find_wishes
from torchweld_deepspeed.options import DeepSpeedOptions

NEEDS = ("deepspeed>=0.19.8,<0.20",)
"""The tested range: private names of it are used, each of which has a test."""

PRESETS: Mapping[str, Mapping[str, object]] = {
    "deepspeed_stage_1": {"stage": 1},
    "deepspeed_stage_1_offload": {"stage": 1, "offload_optimizer": "cpu"},
    "deepspeed_stage_2": {"stage": 2},
    "deepspeed_stage_2_offload": {"stage": 2, "offload_optimizer": "cpu"},
    "deepspeed_stage_3": {"stage": 3},
    "deepspeed_stage_3_offload": {
        "stage": 3,
        "offload_optimizer": "cpu",
        "offload_params": "cpu",
    },
    "deepspeed_stage_3_offload_nvme": {
        "stage": 3,
        "offload_optimizer": "nvme",
        "offload_params": "nvme",
    },
}
"""Lightning's names."""

LACKS = {
    "params.writable": "DeepSpeed steps a copy of the parameters and writes it over them",
    "params.strided": "DeepSpeed lays parameters end to end",
    "params.may_freeze": "DeepSpeed goes on to move what is frozen after set-up, by decay and "
    "momentum",
    "params.may_unfreeze": "DeepSpeed steps what was trainable when the engine was made",
    "params.deepcopy": "parameters refer to DeepSpeed's flat tensors and process groups",
    "grads.elementwise": "the engine goes from backward to the step without showing gradients",
    "grads.whole": "the engine goes from backward to the step without showing gradients",
    "step.closure": "the engine's step takes no closure, and would ignore one without a word",
    "graph.per_rank": "a gradient that one process does not have is not exchanged by it, and the "
    "others wait or get another one's",
}
EMPTY = (
    "at stage 3 parameters are empty between two steps; strategy='fsdp' keeps shards that an "
    "average can read"
)
_NO_COMPILE = Rel(
    "compile",
    "at stage 3 DeepSpeed gathers each layer in hooks that torch.compile cannot trace, and the "
    "first step fails",
    "stage=2, strategy='fsdp', or leave compile out",
)
_WHOLE_FIRST = Adapt(
    {"zero_init": False},
    "a surgery copies weights into new layers, and zero_init would have cut them into pieces",
    when="weights.replaced",
)
CASTS = {
    "bf16-true": "precision='bf16-true' casts parameters; precision='bf16' keeps them in fp32",
    "16": "precision='16' is DeepSpeed's own, which casts parameters over fp32 copies; "
    "precision='bf16' keeps them in fp32",
}


_NO_BATCHNORM = Rel(
    "model.batchnorm",
    "DeepSpeed casts parameters and leaves buffers in fp32, and BatchNorm cannot mix the two",
    "precision='bf16', which keeps the weights in fp32",
)


def deepspeed_claims(options: DeepSpeedOptions, settings: Settings) -> Claims:
    """What stays possible with these options under these settings."""
    provides, lacks = [], dict(LACKS)
    if options.stage == 3:
        lacks["params.local"] = EMPTY
    else:
        provides.append("params.local")
    if settings.precision in CASTS:
        lacks["precision.autocast"] = CASTS[settings.precision]
    else:
        provides.append("precision.autocast")
    return Claims(
        provides=provides,
        lacks=lacks,
        requires=tuple(_required(options, settings)),
        forbids=(
            *([_NO_COMPILE] if options.stage == 3 else []),
            *([_NO_BATCHNORM] if settings.precision == "bf16-true" else []),
        ),
        adapts=(_WHOLE_FIRST,) if options.zero_init else (),
        sets=find_wishes(options, settings),
        settles=(*_settled(options, settings), *find_notes(options)),
    )


def _required(options: DeepSpeedOptions, settings: Settings) -> Iterator[Rel]:
    if "nvme" in (options.offload_optimizer, options.offload_params):
        yield Rel(
            "deepspeed:checkpoints",  # nothing provides it
            "what is on a drive between two steps cannot be saved, restored or exported",
            "offload to 'cpu', or give enable_checkpointing=False",
            severity="warning",
        )
    if options.communication_dtype not in (None, "fp32") and settings.precision == "32":
        yield Rel(
            "precision.reduced",
            f"DeepSpeed ignores communication_dtype={options.communication_dtype!r} where "
            "gradients are fp32",
            "precision='bf16', or leave communication_dtype out",
        )


def _settled(options: DeepSpeedOptions, settings: Settings) -> Iterator[tuple[str, str]]:
    limit = settings.gradient_clip_val
    clips = f"clips gradients at the norm {limit:g}" if limit else "does not clip gradients"
    yield (
        f"the engine {clips}",
        "it is told so always, because it clips at 1.0 where nothing is said",
    )
    yield (
        "the engine accumulates, exchanges, clips and steps; the loss is divided by its window",
        "DeepSpeed's own counter would let windows of unequal length drift",
    )
    yield (
        "a parameter without gradient in a step still decays, and its momentum goes on",
        "DeepSpeed steps with zeros where PyTorch leaves out",
    )
    if options.stage == 3 or settings.precision != "bf16-true":
        yield (
            "a step whose gradients are not finite is left out, on every process",
            "DeepSpeed does so without being asked, where PyTorch would go on with NaN",
        )
    if options.stage == 3 or options.offload_optimizer:
        yield (
            "gradients are cleared after each step",
            "DeepSpeed would step a parameter without gradient by its last one again",
        )
    yield (
        "buckets are no larger than the trained parameters",
        "DeepSpeed allocates 2000 MB however small the model is",
    )
    own = "" if settings.sync_batchnorm else "BatchNorm sees each process's own batch; "
    yield (
        f"{own}evaluation and checkpoints take rank 0's buffers",
        "DeepSpeed never exchanges them, so each process would evaluate another model",
    )
    if settings.precision == "bf16" and options.communication_dtype != "bf16":
        yield (
            "gradients are exchanged in fp32",
            "under autocast DeepSpeed would round those of linear and convolution layers to bf16",
        )


DEEPSPEED = Component(
    name="deepspeed",
    summary="DeepSpeed's ZeRO: optimizer state, gradients (2), parameters (3) sharded, offloaded",
    build="torchweld_deepspeed.strategy:DeepSpeedStrategy",
    options=DeepSpeedOptions,
    claims=deepspeed_claims,
    needs=NEEDS,
    presets=PRESETS,
)
