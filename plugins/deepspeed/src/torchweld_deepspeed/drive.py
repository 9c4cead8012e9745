"""Gradients that wait on a drive at stage 3: which ones, and which DeepSpeed cannot read back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchweld.errors import InvalidArgument
from torchweld_deepspeed.state import named_parameters

if TYPE_CHECKING:
    from torch import nn

DIRECT_BYTES = 512
"""Memory that is read into directly begins at a multiple of it (DeepSpeed's O_DIRECT_ALIGNMENT)."""


def check_readable(zero: Any, model: nn.Module) -> None:
    """Refuse a gradient that DeepSpeed would read into memory where the system cannot.

    It reads each into its place in one buffer. Where that begins at another byte the read fails
    without a word, and the parameter is stepped by what was in the buffer before.

    Args:
        zero: DeepSpeed's optimizer of stage 3, which offloads to a drive.
        model: what it trains.

    Raises:
        InvalidArgument: names the parameter.
    """
    swapper = zero.optimizer_swapper
    for name, parameter in named_parameters(model):
        if not parameter.requires_grad:
            continue
        _, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
        start = offset * swapper.swap_element_size
        if swapper.is_swappable_tensor(numel=numel) and start % DIRECT_BYTES:
            raise InvalidArgument(
                f"offload_optimizer='nvme' was asked for, and DeepSpeed would not read the "
                f"gradient of {name!r} back from the drive: its place begins at byte {start}, "
                f"which is no multiple of {DIRECT_BYTES}, so offload the optimizer to 'cpu'"
            )


def trained_ids(zero: Any) -> list[Any]:
    """DeepSpeed's numbers of what ``zero`` trains."""
    return [parameter.ds_id for group in zero.fp16_groups for parameter in group]
