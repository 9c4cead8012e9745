"""Bytes of a rank under ZeRO: foretold from shapes, and counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchweld.strategies.optimizer_state import state_bytes

if TYPE_CHECKING:
    from torchweld.components import Settings
    from torchweld.interfaces import ParameterShape
    from torchweld_deepspeed.engine import Engine
    from torchweld_deepspeed.options import DeepSpeedOptions

FP32 = 4
"""Bytes of an element that is stepped, of its gradient then, and of its optimizer state."""
ALIGNED = 2
"""Elements: DeepSpeed pads a group of parameters to a multiple of this times the ranks."""

CAST = {"bf16-true": torch.bfloat16, "16": torch.float16}
"""Dtype of the working copies; unlike core's ``cast_dtype``, DeepSpeed casts them for fp16 too."""


def estimate_bytes(
    shapes: Mapping[str, ParameterShape],
    optimizer_slots: int,
    world_size: int,
    options: DeepSpeedOptions,
    settings: Settings,
) -> dict[str, int]:
    """Bytes on the rank with most, wherever they are kept; buckets come on top.

    Working copies are what forward uses, pieces what is stepped: both count as parameters, because
    DeepSpeed keeps the two of them at every precision.

    Args:
        shapes: of a model with one group of parameters.
        optimizer_slots: tensors kept for each trained parameter.
        world_size: number of processes.
        options: whose stage decides.
        settings: whose precision casts the working copies.
    """
    if options.stage == 3:
        working = sum(_stage3_bytes(one, world_size, options, settings) for one in shapes.values())
        pieces = sum(_piece(one, world_size) for one in shapes.values() if one.trained)
    else:
        working = sum(_whole_bytes(one, settings) for one in shapes.values())
        trained = sum(math.prod(one.shape) for one in shapes.values() if one.trained)
        pieces = ALIGNED * -(-trained // (ALIGNED * world_size))
    whole = sum(_whole_bytes(one, settings) for one in shapes.values() if one.trained)
    return {
        "parameters": working + FP32 * pieces,
        "gradients": whole if options.stage == 1 else FP32 * pieces,
        "optimizer": optimizer_slots * FP32 * pieces,
    }


def _itemsize(one: ParameterShape, settings: Settings) -> int:
    cast = CAST.get(settings.precision) if one.dtype.is_floating_point else None
    return (cast or one.dtype).itemsize


def _whole_bytes(one: ParameterShape, settings: Settings) -> int:
    return math.prod(one.shape) * _itemsize(one, settings)


def _piece(one: ParameterShape, world_size: int) -> int:
    """Elements of one parameter on a rank at stage 3, padded."""
    return -(-math.prod(one.shape) // world_size)


def _stage3_bytes(
    one: ParameterShape, world_size: int, options: DeepSpeedOptions, settings: Settings
) -> int:
    """A piece, and the whole of a small parameter."""
    elements = math.prod(one.shape)
    kept = elements if elements <= options.persistence_threshold else 0
    return (_piece(one, world_size) + kept) * _itemsize(one, settings)


def bytes_held(made: Engine, model: nn.Module) -> dict[str, int]:
    """Count the bytes of this rank as :func:`estimate_bytes` foretells them."""
    pieces = sum(flat.nbytes for flat in made.flats)
    working = sum(_working_bytes(parameter, made.stage) for parameter in model.parameters())
    whole = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {
        "parameters": working + pieces,
        "gradients": whole if made.stage == 1 else pieces,
        "optimizer": state_bytes(made.optimizer) if made.optimizer is not None else 0,
    }


def _working_bytes(parameter: Any, stage: int) -> int:
    if stage < 3:
        return int(parameter.nbytes)
    return int(parameter.ds_tensor.nbytes + parameter.nbytes)
