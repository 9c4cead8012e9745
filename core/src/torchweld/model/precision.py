"""What a precision setting does to a model's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from torchweld.errors import RunError
from torchweld.nesting import cast_floats

if TYPE_CHECKING:
    from torch import nn

    from torchweld.components import Precision

_AUTOCAST = {"bf16": torch.bfloat16, "16": torch.float16}


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse what ``device`` cannot do.

    Raises:
        RunError: fp16 without a CUDA device.
    """
    if precision == "16" and device.type != "cuda":
        raise RunError(
            f"precision='16' was asked for, but this run is on {device.type!r}: fp16 needs a CUDA "
            "device for its loss scaling to be of use; choose precision='bf16' or '32'"
        )


def cast_dtype(precision: Precision) -> torch.dtype | None:
    """The dtype to which ``precision`` casts floating parameters and buffers; None: as they are."""
    return torch.bfloat16 if precision == "bf16-true" else None


def forward_under(
    module: nn.Module, precision: Precision, device: torch.device
) -> Callable[..., Any]:
    """Return the forward of ``module`` under ``precision``.

    Floating inputs are cast where parameters are, floating outputs come back in fp32 through any
    nesting. At ``"32"`` it is the module itself: nothing is added to the call.
    """
    if precision == "32":
        return module
    if cast_dtype(precision) is not None:
        return _cast_forward(module)
    return _autocast_forward(module, device.type, _AUTOCAST[precision])


def _autocast_forward(
    module: nn.Module, device_type: str, dtype: torch.dtype
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, dtype=dtype):
            outputs = module(*args, **kwargs)
        return cast_floats(outputs, torch.float32)

    return forward


def _cast_forward(module: nn.Module) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        args = cast_floats(args, torch.bfloat16)
        outputs = module(*args, **cast_floats(kwargs, torch.bfloat16))
        return cast_floats(outputs, torch.float32)

    return forward
