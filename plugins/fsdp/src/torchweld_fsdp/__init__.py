"""Sharded training for torchweld: ``fsdp`` over torch's FSDP2, and FairScale's sharded family.

Importing this module imports neither torch nor fairscale.
"""

from __future__ import annotations

from torchweld import Component, hookimpl
from torchweld_fsdp.components import FSDP
from torchweld_fsdp.fairscale.components import FAIRSCALE_FSDP, FAIRSCALE_OSS, FAIRSCALE_SDP
from torchweld_fsdp.options import FsdpOptions

__all__ = ["FAIRSCALE_FSDP", "FAIRSCALE_OSS", "FAIRSCALE_SDP", "FSDP", "FsdpOptions"]


@hookimpl
def torchweld_strategies() -> list[Component]:
    """``fsdp``, ``fairscale_oss``, ``fairscale_sdp`` and ``fairscale_fsdp``."""
    return [FSDP, FAIRSCALE_OSS, FAIRSCALE_SDP, FAIRSCALE_FSDP]
