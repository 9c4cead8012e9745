"""What Composer's layer replacement loses without a word: put right, or refused.

Measured for mosaicml 0.32.1: a replaced layer is trainable although the old one was frozen, comes
in fp32 on the CPU whatever the old one was, and ``padding_mode``, a subclass's own code and
forward hooks are gone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchweld.errors import SurgeryError

log = logging.getLogger("torchweld")

_COPIED = (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.GroupNorm)
"""What Composer copies setting by setting into another layer, subclasses included."""


@dataclass(frozen=True)
class Before:
    """The layers of a model and their parameters, before a surgery.

    Attributes:
        modules: by name.
        trainable: parameter names to ``requires_grad``.
    """

    modules: Mapping[str, nn.Module]
    trainable: Mapping[str, bool]


def note(model: nn.Module) -> Before:
    """Note what a surgery may lose."""
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    return Before(dict(model.named_modules()), trainable)


def refuse_meta(name: str, model: nn.Module) -> None:
    """Raise when the weights do not exist yet.

    Raises:
        SurgeryError: a parameter is on the meta device.
    """
    found = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if found is not None:
        raise SurgeryError(
            f"{name} copies weights, and {found!r} is on the meta device, without values; "
            "give the model with its weights, not inside torch.device('meta')"
        )


def repair(name: str, before: Before, model: nn.Module) -> None:
    """Give replaced layers the dtype, device and ``requires_grad`` of the old ones.

    Raises:
        SurgeryError: the new layer cannot compute what the old one did.
    """
    changed = list(_changed(before, model))
    replaced = [change for change in changed if change[1] not in set(change[2].modules())]
    _refuse_lost_settings(name, replaced)
    for _, old, new in changed:
        _restore_placement(old, new, model)
    for path, old, _ in replaced:
        if any(m._forward_hooks or m._forward_pre_hooks for m in old.modules()):
            log.warning("%s: the forward hooks of the replaced layer %r are gone", name, path)
    frozen = _freeze_again(before, model, [path for path, _, _ in replaced])
    if frozen:
        log.info("%s: kept %d parameters of replaced layers frozen", name, frozen)


def _changed(before: Before, model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Path, old and new layer of every outermost layer that was replaced or wrapped."""
    done: list[str] = []
    for path, new in model.named_modules():
        old = before.modules.get(path)
        inside = any(path.startswith(f"{outer}.") for outer in done)
        if path and old is not None and old is not new and not inside:
            done.append(path)
            yield path, old, new


def _refuse_lost_settings(name: str, replaced: list[tuple[str, nn.Module, nn.Module]]) -> None:
    lost = [f"{path!r} ({_lost(old, new)})" for path, old, new in replaced if _lost(old, new)]
    if lost:
        raise SurgeryError(
            f"{name} would replace {', '.join(lost)}: Composer makes a plain layer of it, which "
            f"computes something else; leave {name} out, or make these layers plain ones"
        )


def _lost(old: nn.Module, new: nn.Module) -> str:
    """What of ``old`` Composer does not copy into ``new``."""
    if isinstance(old, _COPIED) and type(old) not in _COPIED:
        return f"of class {type(old).__name__}"
    padding = getattr(old, "padding_mode", "zeros")
    return "" if padding in {"zeros", getattr(new, "padding_mode", "")} else f"{padding!r} padding"


def _restore_placement(old: nn.Module, new: nn.Module, model: nn.Module) -> None:
    """Move and cast the new layer to where the old one was; a layer without weights follows."""
    like = _first_float(old)
    if like is None:
        like = _first_float(model)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)


def _first_float(module: nn.Module) -> torch.Tensor | None:
    tensors: Any = (*module.parameters(), *module.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def _freeze_again(before: Before, model: nn.Module, paths: list[str]) -> int:
    """Freeze the parameters of replaced layers whose old ones were; returns how many."""
    frozen = 0
    now = dict(model.named_parameters())
    for path in paths:
        old = {n: t for n, t in before.trainable.items() if n.startswith(f"{path}.")}
        for name in (n for n in now if n.startswith(f"{path}.")):
            if now[name].requires_grad and _was_frozen(name, old):
                now[name].requires_grad_(False)
                frozen += 1
    return frozen


def _was_frozen(name: str, old: Mapping[str, bool]) -> bool:
    """A parameter was frozen when its old namesake was; a new one when the whole layer was."""
    last = name.rpartition(".")[2]
    namesakes = [trainable for n, trainable in old.items() if n.rpartition(".")[2] == last]
    return not any(namesakes) if namesakes else bool(old) and not any(old.values())
