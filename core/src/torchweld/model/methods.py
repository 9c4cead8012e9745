"""Methods of a model other than ``forward``, called the way a module is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from torchweld.errors import InvalidArgument
from torchweld.spelling import did_you_mean


def method_of(model: nn.Module, name: str) -> Callable[..., Any]:
    """Return the bound method ``name`` of ``model``.

    Raises:
        InvalidArgument: it has none.
    """
    method: Any = getattr(model, name, None)
    if isinstance(method, nn.Module) or not callable(method):
        own = [n for n in dir(model) if not n.startswith("_") and callable(getattr(model, n))]
        what = "a submodule" if isinstance(method, nn.Module) else "no method"
        raise InvalidArgument(
            f"mark_forward_method({name!r}): that is {what} of {type(model).__name__}"
            f"{'; ' if did_you_mean(name, own) else ''}{did_you_mean(name, own)}: give the name of "
            "a method that takes inputs and returns outputs"
        )
    found: Callable[..., Any] = method
    return found


@contextmanager
def in_place_of_forward(model: nn.Module, method: Callable[..., Any]) -> Iterator[None]:
    """Let the next call of ``model`` run ``method``, which may itself call ``model`` again."""
    had = "forward" in vars(model)
    forward = model.forward

    def restore() -> None:
        if had:
            model.forward = forward
        elif "forward" in vars(model):
            del model.forward

    def redirected(*args: Any, **kwargs: Any) -> Any:
        restore()
        return method(*args, **kwargs)

    model.forward = redirected
    try:
        yield
    finally:
        restore()
