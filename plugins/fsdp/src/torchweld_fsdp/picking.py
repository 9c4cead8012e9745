"""What the option ``wrap`` of the strategy picks: the modules that are to become FSDP units."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Union

from torch import nn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from torchweld.errors import InvalidArgument
from torchweld.model.blocks import CONTAINERS, numel, repeated_blocks
from torchweld.spelling import did_you_mean, listing
from torchweld_fsdp.options import Wrap

Predicate = Callable[[str, nn.Module], bool]
Entry = Union[str, type[nn.Module], nn.Module]

_KINDS = (
    "None (automatic), class names or classes, names of modules or modules, a number of "
    "parameters, a predicate (name, module) -> bool, or a policy of torch.distributed.fsdp.wrap"
)


def pick_modules(model: nn.Module, wrap: Wrap) -> list[nn.Module]:
    """Return the modules that ``wrap`` asks for, each perhaps more than once; see ``choose_units``.

    Raises:
        InvalidArgument: nothing matches, a module that is not in the model, a number below 1, or
            something that is no way to choose.
    """
    if wrap is None:
        return repeated_blocks(model)
    if isinstance(wrap, int) and not isinstance(wrap, bool):
        return _pick_by_size(model, wrap)
    if isinstance(wrap, (str, type, nn.Module)):
        return _pick_entry(model, wrap)
    if isinstance(wrap, Iterable):
        entries = list(wrap)
        if not entries:
            raise InvalidArgument("wrap=[] names no unit: leave it out for automatic units")
        return [module for entry in entries for module in _pick_entry(model, entry)]
    if hasattr(wrap, "_run_policy") or callable(wrap):
        return _pick_by_rule(model, wrap)
    raise InvalidArgument(f"wrap={wrap!r} does not say which modules are units: give {_KINDS}")


def _pick_by_size(model: nn.Module, smallest: int) -> list[nn.Module]:
    if smallest < 1:
        raise InvalidArgument(
            f"wrap={smallest}: a unit cannot have fewer than one parameter; give the smallest "
            "number of parameters of a unit, 1 or more"
        )
    picked = _walk(model, partial(size_based_auto_wrap_policy, min_num_params=smallest))[0]
    if not picked:
        raise InvalidArgument(
            f"wrap={smallest}: no module below the root brings so many parameters (the model has "
            f"{numel(model)}); give a smaller number"
        )
    return picked


def _pick_entry(model: nn.Module, entry: Entry) -> list[nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(entry, nn.Module):
        if not any(entry is module for module in modules.values()):
            raise InvalidArgument(
                f"wrap= has a {type(entry).__name__} that is not a module of the model (it may "
                "have been replaced or copied): give its name or its class"
            )
        picked = [entry]
    elif isinstance(entry, str):
        picked = [modules[entry]] if entry in modules else _of_class_name(model, entry)
    elif isinstance(entry, type):
        picked = [module for module in modules.values() if isinstance(module, entry)]
    else:
        raise InvalidArgument(f"wrap= has {entry!r}: give {_KINDS}")
    return _not_nothing(model, picked, entry)


def _of_class_name(model: nn.Module, name: str) -> list[nn.Module]:
    return [m for m in model.modules() if name in {kind.__name__ for kind in type(m).__mro__}]


def _pick_by_rule(model: nn.Module, rule: Any) -> list[nn.Module]:
    if hasattr(rule, "_run_policy"):  # ModuleWrapPolicy and CustomPolicy
        picked = _pick_by_policy(model, rule)
    elif "recurse" in inspect.signature(rule).parameters:  # the functions, with settings bound
        picked = _walk(model, rule)[0]
    else:
        picked = _pick_by_predicate(model, rule)
    return _not_nothing(model, picked, rule)


def _pick_by_policy(model: nn.Module, policy: Any) -> list[nn.Module]:
    settings = policy._run_policy(model, ignored_modules=set(), root_kwargs={})
    for module, own in settings.items():
        if own:
            raise InvalidArgument(
                f"wrap={policy!r} gives a {type(module).__name__} settings of its own "
                f"({listing(own)}), which only FSDP1 takes: let the policy return True for it"
            )
    return list(settings)


def _pick_by_predicate(model: nn.Module, predicate: Predicate) -> list[nn.Module]:
    try:
        inspect.signature(predicate).bind("name", model)
    except TypeError as error:
        raise InvalidArgument(
            f"wrap={predicate!r} cannot be called as (name, module) ({error}): give a predicate of "
            "these two"
        ) from error
    return [m for name, m in model.named_modules() if m is not model and predicate(name, m)]


def _walk(module: nn.Module, policy: Callable[..., bool], depth: int = 0) -> tuple[list[Any], int]:
    """Ask a policy of torch's as its wrapper would; returns the picked and their parameters."""
    size = numel(module)
    if not policy(module=module, recurse=True, nonwrapped_numel=size):
        return [], 0
    picked, covered = [], 0
    for child in module.children():
        below, count = _walk(child, policy, depth + 1)
        picked += below
        covered += count
    if depth and policy(module=module, recurse=False, nonwrapped_numel=size - covered):
        return [*picked, module], size
    return picked, covered


def _not_nothing(model: nn.Module, picked: Sequence[nn.Module], asked: object) -> list[nn.Module]:
    usable = [module for module in picked if module is not model and numel(module)]
    if usable:
        return usable
    classes = nameable_classes(model)
    meant = _meant(model, asked) if isinstance(asked, str) and not picked else ""
    what = "only the root or modules without parameters" if picked else "no module of the model"
    raise InvalidArgument(
        f"wrap= asks for {_spelt(asked)}, which matches {what}: "
        f"{meant or 'name others'} (its classes are: {listing(classes)})"
    )


def _meant(model: nn.Module, asked: str) -> str:
    names, classes = dict(model.named_modules()), nameable_classes(model)
    first, second = (names, classes) if "." in asked else (classes, names)
    return did_you_mean(asked, first) or did_you_mean(asked, second)


def nameable_classes(model: nn.Module) -> set[str]:
    """The classes that can be named: of what is below the root, no container, with parameters."""
    below = (module for module in model.modules() if module is not model and numel(module))
    return {type(module).__name__ for module in below if not isinstance(module, CONTAINERS)}


def _spelt(asked: object) -> str:
    return asked.__name__ if isinstance(asked, type) else repr(asked)
