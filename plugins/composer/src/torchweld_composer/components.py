"""The four named surgeries: what they are, what they claim and why."""

from __future__ import annotations

from torchweld import Adapt, Claims, Component, Rel, Settings
from torchweld_composer.options import (
    BlurPoolOptions,
    ChannelsLastOptions,
    CutMixOptions,
    LabelSmoothingOptions,
)

NEEDS = ("mosaicml>=0.32,<0.33",)
"""What has to be installed before ``build`` is imported; the README has the pip command."""

LOSSES_MIXED = "composer:losses.mixed"
"""A word of this plugin: two losses are mixed, each with targets of its own."""

MIXED_TWICE = "the second would mix samples that are mixed already, and train on wrong targets"
ONE_MIXER = "keep one of the two"
VISIBLE = Rel(
    "loss.visible",
    "it changes the targets between the model and the loss",
    "give the loss to fit: loss=F.cross_entropy",
)
SOFT = Rel(
    "loss.accepts_soft_targets",
    "its targets are probabilities, one row of classes for each sample",
    "use a loss that takes probabilities, such as F.cross_entropy",
)
ALL_COUNT = Rel(
    "targets.ignored",
    "a target that the loss ignores (ignore_index) would be trained on as one without a class",
    "leave such samples out of the data, or this surgery",
)
IMAGES = Rel("inputs.4d", "it works on images of shape (batch, channels, height, width)")
CONVOLUTIONS = Rel("model.conv", "it acts on convolutions, the model has to have some")
FILTERS_FOLLOW = Rel(
    "precision.uniform",
    "its blur filters are buffers, and cannot be applied to weights of another dtype",
    "use precision='bf16', which keeps the weights in fp32",
)


BLURPOOL_CLAIMS = Claims(
    edits="model.modules",
    provides="weights.replaced",
    requires=(CONVOLUTIONS, FILTERS_FOLLOW),
    forbids=Rel(
        "compile",
        "its padding reads a value back from the tensor: 26 graph breaks in a small ResNet",
        "leave compile=False, or blurpool out",
        severity="warning",
    ),
)
LABEL_SMOOTHING_CLAIMS = Claims(
    edits="batch.targets",
    provides="targets.smoothed",
    requires=(VISIBLE, SOFT),
    forbids=(
        Rel("loss.smooths", "smoothing twice smooths too much", "set label_smoothing=0 there"),
        Rel("targets.smoothed", "smoothing twice smooths too much", "keep one of the two"),
        ALL_COUNT,
    ),
)


def channels_last_claims(options: ChannelsLastOptions, _settings: Settings) -> Claims:
    """Claims of ``channels_last``: of the weights, or of the inputs alone."""
    inputs_only = Adapt(
        {"weights": False},
        "only the inputs become NHWC: the strides of the weights would be lost or refused",
        unless="params.strided",
    )
    return Claims(
        edits="model.modules" if options.weights else "batch.inputs",
        requires=Rel("model.conv", "the format speeds up convolutions, the model has to have some"),
        after=Rel("weights.replaced", "replaced layers would lose the format"),
        adapts=inputs_only,
    )


def cutmix_claims(options: CutMixOptions, _settings: Settings) -> Claims:
    """Claims of ``cutmix``: of the targets, or of the loss."""
    return mixer_claims(interpolate_loss=options.interpolate_loss, images=True)


def mixer_claims(*, interpolate_loss: bool, images: bool) -> Claims:
    """Claims of what mixes pairs of samples, CutMix or MixUp."""
    shape = (IMAGES,) if images else ()
    mixed = (
        Rel("targets.soft", MIXED_TWICE, ONE_MIXER),
        Rel(LOSSES_MIXED, MIXED_TWICE, ONE_MIXER),
    )
    if not interpolate_loss:
        first = Rel(
            "targets.smoothed", "smoothed first, a mixed target keeps half of its hard part"
        )
        return Claims(
            edits=("batch.inputs", "batch.targets"),
            provides="targets.soft",
            requires=(VISIBLE, SOFT, *shape),
            forbids=(*mixed, ALL_COUNT),
            before=first,
        )
    hard = Rel(
        "targets.smoothed",
        "interpolate_loss=True mixes two losses, and the second takes the targets unsmoothed",
        "interpolate_loss=False mixes the targets instead, or leave the smoothing out",
    )
    return Claims(
        edits=("batch.inputs", "loss.fn"),
        provides=LOSSES_MIXED,
        requires=(VISIBLE, *shape),
        forbids=(*mixed, hard),
    )


BLURPOOL = Component(
    name="blurpool",
    summary="anti-aliased strided convolutions and pooling",
    build="torchweld_composer.surgeries:blurpool",
    options=BlurPoolOptions,
    claims=BLURPOOL_CLAIMS,
    needs=NEEDS,
)
CHANNELS_LAST = Component(
    name="channels_last",
    summary="NHWC memory format",
    build="torchweld_composer.surgeries:channels_last",
    options=ChannelsLastOptions,
    claims=channels_last_claims,
    needs=NEEDS,
)
CUTMIX = Component(
    name="cutmix",
    summary="paste a patch of another image, mix the targets by area",
    build="torchweld_composer.surgeries:cutmix",
    options=CutMixOptions,
    claims=cutmix_claims,
    needs=NEEDS,
)
LABEL_SMOOTHING = Component(
    name="label_smoothing",
    summary="mix the targets with the uniform distribution",
    build="torchweld_composer.surgeries:label_smoothing",
    options=LabelSmoothingOptions,
    claims=LABEL_SMOOTHING_CLAIMS,
    needs=NEEDS,
)
