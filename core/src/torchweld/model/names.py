"""Canonical names: the ones of the user's own model, without what wrappers put in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module"})


def canonical(name: str, wrappers: frozenset[str] = _WRAPPERS) -> str:
    """Return ``name`` without the segments that wrappers add.

    >>> canonical("module.layers.0._orig_mod.weight")
    'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in wrappers)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to ``model.state_dict()``, under canonical names, each once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        transient = module._non_persistent_buffers_set
        for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
            if name.rpartition(".")[2] not in transient and id(buffer) not in seen:
                seen.add(id(buffer))
                yield canonical(name), buffer


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters under canonical names, each once."""
    return ((canonical(name), parameter) for name, parameter in model.named_parameters())
