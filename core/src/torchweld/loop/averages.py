"""Averaged weights: put into the model for a while by whoever owns ``weights.average``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torchweld.errors import InvalidArgument

if TYPE_CHECKING:
    from torchweld.loop.wiring import Wiring


def average_of(wiring: Wiring) -> Any | None:
    """What keeps an average in this run: a callback or after-step with ``averaged()``; or None."""
    owners = (*wiring.callbacks, *wiring.parts.after_step)
    return next((owner for owner in owners if hasattr(owner, "averaged")), None)


def averaged(wiring: Wiring) -> AbstractContextManager[None]:
    """Have the averaged weights in the model meanwhile; every rank must enter it.

    Raises:
        InvalidArgument: nothing in this run keeps an average.
    """
    owner = average_of(wiring)
    if owner is None:
        raise InvalidArgument(
            "weights='average': nothing in this run averages its weights; give "
            "a surgery that owns 'weights.average' (and has averaged()), such as an EMA"
        )
    return owner.averaged()  # type: ignore[no-any-return]  # a stranger's


def check_weights(weights: str) -> bool:
    """Whether the averaged weights are meant.

    Raises:
        InvalidArgument: neither ``"trained"`` nor ``"average"``.
    """
    if weights not in {"trained", "average"}:
        raise InvalidArgument(f"weights={weights!r}: choose 'trained' or 'average'")
    return weights == "average"
