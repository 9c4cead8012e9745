"""What the data source claims, and what it decides without being asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torchweld import Claims, Rel, Settings
from torchweld_ffcv.options import FfcvOptions
from torchweld_ffcv.spec import ImageSpec

_MIXERS = ("ImageMixup", "LabelMixup", "MixupToOneHot")
_SOFT = Rel(
    "loss.accepts_soft_targets",
    "MixupToOneHot makes probabilities, one row of classes for each sample",
    "use a loss that takes probabilities, such as F.cross_entropy",
)
_COMPILE = Rel(
    "compile",
    "the last batch of an epoch is smaller, and a graph is compiled for it once more",
    "drop_last=True",
    severity="warning",
)
_EVERY_SAMPLE = (
    "an uneven last batch counts by its real samples, on every process",
    "padding it with samples seen before would count those twice",
)
_DECODING = (
    "JPEG files are decoded with libjpeg-turbo's fast transform, as FFCV does",
    "values differ from Pillow's by 1 or 2 of 255, at quality 90 by up to 5, at 95 by up to 10",
)
_UINT8 = (
    "images stay uint8 in 0 … 255",
    "normalize=None leaves it to the model, whose first layer refuses whole numbers otherwise",
)
_MIDDLE = (
    "evaluation cuts out the middle and flips nothing",
    "chance belongs to training; val_data=use('ffcv', spec=…) chooses something else",
)
_EVERYWHERE = (
    "pipelines= are run in evaluation as they are",
    "FFCV's operations do not say which of them belong to training; give val_data= its own",
)


def ffcv_claims(options: FfcvOptions, _settings: Settings) -> Claims:
    """Claims of ``ffcv``; its batches are owned and its targets int64 of shape (batch,)."""
    mixers = set(_operations(options.pipelines or {})) & set(_MIXERS)
    everywhere = (_EVERYWHERE,) if options.pipelines is not None else ()
    return Claims(
        provides="targets.soft" if mixers else (),
        requires=_SOFT if "MixupToOneHot" in mixers else (),
        forbids=() if options.drop_last else _COMPILE,
        settles=(_EVERY_SAMPLE, _DECODING, *everywhere, *_settled_by(options.spec or {})),
    )


def _operations(pipelines: Mapping[str, Any]) -> Iterator[str]:
    """Names of the classes of FFCV's operations, which are looked at without importing them."""
    for pipeline in pipelines.values():
        for operation in getattr(pipeline, "transforms", pipeline) or ():
            yield type(operation).__name__


def _settled_by(spec: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    images = [one for one in spec.values() if isinstance(one, ImageSpec)]
    if any(image.normalize is None for image in images):
        yield _UINT8
    if any(image.for_evaluation() != image for image in images):
        yield _MIDDLE
