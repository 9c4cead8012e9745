"""What is known about Composer's own algorithms: events, claims, order; no composer import.

The orders were found by running the algorithms in both: selective_backprop, progressive_resizing,
colout, cutout, the mixers and label_smoothing in every step; among the surgeries what replaces
layers first, then what wraps them, then the memory format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchweld import Claims, Rel
from torchweld_composer.components import (
    CONVOLUTIONS,
    IMAGES,
    VISIBLE,
    mixer_claims,
)

READS_WEIGHTS = Rel("params.local", "it reads the weights between two steps")
WRITES_WEIGHTS = Rel("params.writable", "it writes weights between two steps")
REPLACED_AFTERWARDS = "a layer that is replaced afterwards would lose it"


@dataclass(frozen=True)
class Known:
    """One algorithm of Composer's.

    Attributes:
        name: of the component.
        summary: one line.
        events: the events it answers, given the algorithm object.
        claims: given the algorithm object.
        asks: its ``match`` decides in every step; otherwise the events alone decide.
        timed: it follows the progress of the run.
        unresumable: why a checkpoint cannot continue it; empty when one can.
        needs: requirements beside Composer itself.
    """

    name: str
    summary: str
    events: Callable[[Any], tuple[str, ...]]
    claims: Callable[[Any], Claims]
    asks: bool = False
    timed: bool = False
    unresumable: str = ""
    needs: tuple[str, ...] = ()


def at(*events: str) -> Callable[[Any], tuple[str, ...]]:
    """The same events for every object of the class."""
    return lambda _: events


def always(claims: Claims) -> Callable[[Any], Claims]:
    """The same claims for every object of the class."""
    return lambda _: claims


def _mixer_events(algorithm: Any) -> tuple[str, ...]:
    return ("BEFORE_FORWARD", "BEFORE_BACKWARD" if algorithm.interpolate_loss else "BEFORE_LOSS")


def _update_events(algorithm: Any) -> str:
    """Where EMA and SWA update: every step, or every epoch."""
    return "BATCH_END" if algorithm.update_interval.unit.value == "ba" else "EPOCH_END"


def _ema_events(algorithm: Any) -> tuple[str, ...]:
    return ("INIT", "FIT_START", _update_events(algorithm), "EVAL_START", "EVAL_END")


def _swa_events(algorithm: Any) -> tuple[str, ...]:
    return ("INIT", _update_events(algorithm))


def _sampled(algorithm: Any) -> bool:
    return not getattr(algorithm, "batch", False)


def _colout_events(algorithm: Any) -> tuple[str, ...]:
    return () if _sampled(algorithm) else ("AFTER_DATALOADER",)


def _colout_claims(algorithm: Any) -> Claims:
    if _sampled(algorithm):
        return _SAMPLE_CLAIMS
    return Claims(
        edits=("batch.inputs", "batch.targets"),
        requires=IMAGES,
        before=(
            Rel("cutout", "a hole that is cut first would lose rows and columns"),
            Rel("targets.soft", "the mixed area is computed from the size of the image"),
            Rel("composer:losses.mixed", "the mixed area is computed from the size of the image"),
            Rel("targets.smoothed", "smoothing is the last change of the targets"),
        ),
    )


def _depth_events(algorithm: Any) -> tuple[str, ...]:
    return ("INIT", "BATCH_START") if float(algorithm.drop_warmup.value) > 0 else ("INIT",)


def _depth_claims(algorithm: Any) -> Claims:
    if algorithm.stochastic_method != "block":
        return Claims(edits="model.modules")
    differs = Rel(
        "graph.per_rank",
        "it skips whole blocks at random, others on every process",
        "stochastic_method='sample' skips samples instead",
    )
    return Claims(edits="model.modules", provides="graph.random", requires=differs)


def _clipping_claims(algorithm: Any) -> Claims:
    kind, threshold = algorithm.clipping_type, algorithm.clipping_threshold
    if kind == "norm":
        why = "Composer's GradientClipping asks for it"
        return Claims(
            edits=(),
            sets=(
                ("gradient_clip_val", float(threshold), why),
                ("gradient_clip_algorithm", "norm", why),
            ),
        )
    if kind == "value":
        return Claims(
            edits="grads",
            requires=Rel("grads.stepped", "it clips single gradients, after they are complete"),
        )
    why = "it compares the norm of each gradient with that of its weight"
    return Claims(edits="grads", requires=Rel("grads.stepped_whole", why))


def _resizing_claims(algorithm: Any) -> Claims:
    schedule = "two schedules of the resolution work against each other"
    return Claims(
        edits=("batch.inputs", "batch.targets") if algorithm.resize_targets else "batch.inputs",
        requires=IMAGES,
        forbids=(
            Rel("loader.resizes", schedule, "leave one of the two schedules out"),
            Rel("compile", "every size compiles again", severity="warning"),
        ),
        before=(
            Rel("colout", "its sizes are computed from the size in the data"),
            Rel("cutout", "a hole is cut in the size that is trained on"),
            Rel("targets.soft", "images are mixed in the size that is trained on"),
            Rel("composer:losses.mixed", "images are mixed in the size that is trained on"),
        ),
    )


def _selective_claims(_algorithm: Any) -> Claims:
    twice = Rel(
        "model.batchnorm",
        "its extra forward pass updates the BatchNorm statistics a second time",
        severity="warning",
    )
    first = ("progressive_resizing", "colout", "cutout", "targets.soft", "composer:losses.mixed")
    return Claims(
        edits=("batch.inputs", "batch.targets"),
        requires=VISIBLE,
        forbids=twice,
        before=(
            *(
                Rel(other, "samples are chosen by their loss before they are changed")
                for other in first
            ),
            Rel("targets.smoothed", "samples are chosen by the loss of their own targets"),
        ),
    )


_SAMPLE_CLAIMS = Claims(
    edits="batch.inputs",
    requires=Rel("loader.torch", "it changes single samples inside a torch Dataset"),
)
_CUTOUT_CLAIMS = Claims(
    edits="batch.inputs",
    requires=IMAGES,
    before=(
        Rel("targets.soft", "a hole that is cut in mixed images changes the mixture"),
        Rel("composer:losses.mixed", "a hole that is cut in mixed images changes the mixture"),
    ),
)
AVERAGE_WRITTEN = "composer:average.written"
"""A word of this plugin: an average is written into the weights while training goes on."""

_EMA_CLAIMS = Claims(
    owns="weights.average",
    edits=(),
    requires=READS_WEIGHTS,
    forbids=Rel(
        AVERAGE_WRITTEN,
        "swa writes its average into the weights on the way, and validation measures ema's, which "
        "follows that jump late",
        "keep one of the two",
        severity="warning",
    ),
    before=Rel("swa", "it averages the weights that the step left"),
)
_SWA_CLAIMS = Claims(
    edits="weights.average",
    provides=AVERAGE_WRITTEN,
    requires=(
        Rel("params.deepcopy", "it averages into a deep copy of the model"),
        Rel("params.writable", "it writes the average back into the model at the end"),
    ),
)
_SAM_CLAIMS = Claims(
    edits="optimizer",
    requires=(
        Rel("step.closure", "it evaluates the loss twice a step"),
        Rel("grads.elementwise", "it moves every weight along its own gradient"),
    ),
    forbids=Rel("precision.fp16", "its two passes would need two loss scales"),
)
_FREEZING_CLAIMS = Claims(
    edits="optimizer",
    provides="params.freeze_midrun",
    requires=Rel("params.may_freeze", "it freezes layers at the end of epochs"),
)
_REDUCED = Rel(
    "precision.reduced",
    "the layers act under reduced precision only",
    "use precision='bf16'",
    severity="warning",
)
_LOW_PRECISION_CLAIMS = Claims(
    edits="model.modules",
    requires=(
        _REDUCED,
        Rel("device.cuda", "the layers ask for CUDA's autocast", severity="warning"),
    ),
    after=Rel("gated_linear_units", "it brings layers of its own"),
)
_SQUEEZE_CLAIMS = Claims(
    edits="model.modules",
    requires=CONVOLUTIONS,
    after=Rel("blurpool", "it wraps the convolutions that blurpool makes"),
    before=Rel("factorize", "it squeezes the channels that the model was designed with"),
)
_FACTORIZE_CLAIMS = Claims(
    edits="model.modules",
    provides="weights.replaced",
    after=Rel("blurpool", "what is factorised is no single convolution any more"),
)
_STANDARDIZATION_CLAIMS = Claims(
    edits="model.modules",
    requires=CONVOLUTIONS,
    after=Rel("weights.replaced", REPLACED_AFTERWARDS),
)
_GYRO_CLAIMS = Claims(
    edits="model.modules",
    requires=Rel(
        "precision.autocast",
        "its masks are fp32, and so is then what meets weights of another dtype",
        "use precision='bf16', which keeps the weights in fp32",
    ),
)
_ALIBI_CLAIMS = Claims(
    edits=("model.modules", "batch.inputs"),
    requires=Rel(
        "precision.uniform",
        "its biases are buffers, and are added to attention scores of the weights' dtype",
        "use precision='bf16', which keeps the weights in fp32",
    ),
)
_MODEL_CLAIMS = Claims(edits="model.modules")
_NEW_LAYERS_CLAIMS = Claims(edits="model.modules", provides="weights.replaced")
_SEQUENCE_CLAIMS = Claims(
    edits="batch.inputs",
    before=Rel("alibi", "sequences are cut before they are reshaped"),
    forbids=Rel("compile", "every length compiles again", severity="warning"),
)

KNOWN: dict[str, Known] = {
    "AugMix": Known("augmix", "mix augmented copies", at(), always(_SAMPLE_CLAIMS)),
    "Alibi": Known(
        "alibi",
        "attention with linear biases",
        at("INIT", "AFTER_DATALOADER"),
        always(_ALIBI_CLAIMS),
        # As Composer's extra "nlp" says: later ones call attention with arguments that its
        # replacement does not take.
        needs=("transformers>=4.11,<4.54",),
    ),
    "ColOut": Known("colout", "leave out rows and columns", _colout_events, _colout_claims),
    "CutOut": Known("cutout", "mask squares", at("AFTER_DATALOADER"), always(_CUTOUT_CLAIMS)),
    "EMA": Known(
        "ema",
        "evaluate with averaged weights",
        _ema_events,
        always(_EMA_CLAIMS),
        asks=True,
        timed=True,
    ),
    "Factorize": Known(
        "factorize", "low-rank layers instead of wide ones", at("INIT"), always(_FACTORIZE_CLAIMS)
    ),
    "GatedLinearUnits": Known(
        "gated_linear_units", "gated feed-forward layers", at("INIT"), always(_NEW_LAYERS_CLAIMS)
    ),
    "GhostBatchNorm": Known(
        "ghost_batchnorm",
        "normalise parts of the batch",
        at("INIT"),
        always(
            Claims(
                edits="model.modules",
                requires=Rel("model.batchnorm", "it acts on BatchNorm layers"),
            )
        ),
    ),
    "GradientClipping": Known(
        "gradient_clipping",
        "clip gradients",
        lambda algorithm: () if algorithm.clipping_type == "norm" else ("AFTER_TRAIN_BATCH",),
        _clipping_claims,
    ),
    "GyroDropout": Known(
        "gyro_dropout",
        "dropout from a pool of masks",
        at("FIT_START"),
        always(_GYRO_CLAIMS),
        timed=True,
        unresumable="it draws its masks anew",
    ),
    "LayerFreezing": Known(
        "layer_freezing",
        "freeze early layers on the way",
        at("EPOCH_END"),
        always(_FREEZING_CLAIMS),
        timed=True,
        unresumable="it does not save which layers are frozen",
    ),
    "LowPrecisionGroupNorm": Known(
        "low_precision_groupnorm",
        "GroupNorm in reduced precision",
        at("INIT"),
        always(_LOW_PRECISION_CLAIMS),
    ),
    "LowPrecisionLayerNorm": Known(
        "low_precision_layernorm",
        "LayerNorm in reduced precision",
        at("INIT"),
        always(_LOW_PRECISION_CLAIMS),
    ),
    "MixUp": Known(
        "mixup",
        "mix pairs of samples and their targets",
        _mixer_events,
        lambda algorithm: mixer_claims(interpolate_loss=algorithm.interpolate_loss, images=False),
    ),
    "NoOpModel": Known("no_op_model", "train nothing", at("INIT"), always(_MODEL_CLAIMS)),
    "ProgressiveResizing": Known(
        "progressive_resizing",
        "train on small images first",
        at("AFTER_DATALOADER"),
        _resizing_claims,
        timed=True,
    ),
    "RandAugment": Known("randaugment", "random augmentations", at(), always(_SAMPLE_CLAIMS)),
    "SAM": Known("sam", "sharpness-aware minimisation", at("AFTER_LOAD"), always(_SAM_CLAIMS)),
    "SWA": Known(
        "swa",
        "average weights near the end",
        _swa_events,
        always(_SWA_CLAIMS),
        asks=True,
        timed=True,
    ),
    "SelectiveBackprop": Known(
        "selective_backprop",
        "train on the samples with the largest loss",
        at("INIT", "AFTER_DATALOADER"),
        _selective_claims,
        asks=True,
        timed=True,
    ),
    "SeqLengthWarmup": Known(
        "seq_length_warmup",
        "train on short sequences first",
        at("AFTER_DATALOADER"),
        always(_SEQUENCE_CLAIMS),
        timed=True,
    ),
    "SqueezeExcite": Known("squeeze_excite", "weigh channels", at("INIT"), always(_SQUEEZE_CLAIMS)),
    "StochasticDepth": Known(
        "stochastic_depth",
        "skip blocks at random",
        _depth_events,
        _depth_claims,
        timed=True,
    ),
    "WeightStandardization": Known(
        "weight_standardization",
        "standardise the weights of convolutions",
        at("INIT"),
        always(_STANDARDIZATION_CLAIMS),
    ),
    "BlurPool": Known("blurpool", "", at("INIT"), always(_MODEL_CLAIMS)),
    "ChannelsLast": Known("channels_last", "", at("INIT"), always(_MODEL_CLAIMS)),
    "CutMix": Known("cutmix", "", _mixer_events, always(_MODEL_CLAIMS)),
    "LabelSmoothing": Known("label_smoothing", "", at("BEFORE_LOSS"), always(_MODEL_CLAIMS)),
}
"""Class names of ``composer.algorithms``; claims of the last four are in ``components.py``."""


def known(algorithm: object) -> Known | None:
    """The entry of an algorithm of Composer's own; None for a stranger's, a subclass included."""
    kind = type(algorithm)
    return KNOWN.get(kind.__name__) if kind.__module__.startswith("composer.algorithms.") else None
