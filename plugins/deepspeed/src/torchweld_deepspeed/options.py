"""The options of ``deepspeed``: plain data, neither torch nor deepspeed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

from torchweld_deepspeed.merging import settle

UserConfig = Union[str, Mapping[str, Any], None]
"""A user's own DeepSpeed configuration: the path of a JSON file, or a mapping."""


@dataclass(frozen=True)
class DeepSpeedOptions:
    """What DeepSpeed shards, and where it keeps it; what ``config`` says too must agree."""

    stage: Literal[0, 1, 2, 3] | None = None  # shards optimizer state (1), gradients (2: the
    # default), parameters (3); None takes the one of ``config``
    offload_optimizer: Literal["cpu", "nvme"] | None = None  # where master weights and state live
    offload_params: Literal["cpu", "nvme"] | None = None  # stage 3: where parameters wait
    nvme_path: str | None = None  # directory of what is offloaded to "nvme"
    bucket_elements: int | None = None  # exchanged at once; None: the trained ones, at most 5e8
    overlap_comm: bool = False  # exchange gradients beside backward; stages 2 and 3
    zero_init: bool = False  # stage 3: cut every layer into pieces as soon as it is built
    persistence_threshold: int = 100_000  # stage 3: parameters below this size stay whole
    communication_dtype: Literal["fp32", "fp16", "bf16"] | None = None  # of exchanged gradients
    cpu_adam: bool = False  # DeepSpeed's compiled Adam for an offloaded optimizer
    config: UserConfig = None  # a DeepSpeed JSON file, or what is in one
    verbose: bool = False  # show what DeepSpeed prints

    def __post_init__(self) -> None:
        """Read ``config`` once, and take from it what was left out here.

        Raises:
            ValueError: it has faults, contradicts an option, or options contradict each other.
            TypeError: it is neither a path nor a mapping.
        """
        for name, value in settle(self).items():
            object.__setattr__(self, name, value)
