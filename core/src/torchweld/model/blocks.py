"""The repeated blocks of a model: the layers of a transformer, the stages of a ResNet.

What is sharded, compiled or computed again one by one is best such a block: large enough to be
worth its cost, small enough to save memory, and alike, so that one compiled graph serves many.
"""

from __future__ import annotations

from collections import Counter

from torch import nn

SMALLEST_SHARE = 0.005  # handling less than this one by one costs more than it saves
# fully_shard of torch 2.7 refuses these and their subclasses, with a forward of their own or not;
# later versions refuse those without one. Nobody calls them, so nothing can be done around a call.
CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules with children whose class occurs more than once."""
    smallest = SMALLEST_SHARE * numel(model)
    repeated, siblings = _repeated_classes(model), _sibling_sequentials(model)
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module is model or module in inside or isinstance(module, CONTAINERS):
            continue
        wanted = type(module) in repeated or module in siblings
        if wanted and _has_children(module) and numel(module) >= smallest:
            blocks.append(module)
            inside.update(module.modules())
    return blocks


def _repeated_classes(model: nn.Module) -> set[type[nn.Module]]:
    children = (child for module in model.modules() for child in module.children())
    counts = Counter(type(child) for child in children if numel(child) and _has_children(child))
    plain = {nn.Sequential, *CONTAINERS}
    return {kind for kind, count in counts.items() if count > 1 and kind not in plain}


def _sibling_sequentials(model: nn.Module) -> set[nn.Module]:
    """Plain Sequentials in a ModuleList of nothing else: the layers of a model without classes."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            entries = [child for child in module.children() if numel(child)]
            if len(entries) > 1 and all(type(entry) is nn.Sequential for entry in entries):
                found.update(entries)
    return found


def numel(module: nn.Module) -> int:
    """Number of parameter entries of ``module``, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None
