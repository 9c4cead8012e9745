"""Which modules of a model become FSDP units: each is gathered, used and freed as one.

Found automatically, or chosen by the user; then what cannot be a unit is left to the unit around
it, and said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from torchweld.model.blocks import CONTAINERS, numel
from torchweld.spelling import listing
from torchweld_fsdp.options import Wrap
from torchweld_fsdp.picking import nameable_classes, pick_modules

Named = tuple[str, nn.Module]


@dataclass(frozen=True)
class Units:
    """The modules that are sharded one by one; what is in none of them belongs to the root.

    Attributes:
        units: name and module, inner ones before outer ones, else in the order of the model; the
            root is not among them.
        share: part of the model's parameters that is in units, 0 to 1.
        largest: part of the model's parameters that the largest unit gathers at once, 0 to 1.
        warnings: what was left out and why, each a sentence.
    """

    units: tuple[Named, ...]
    share: float
    largest: float
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for the plan: ``12 EncoderBlock (98 % of the parameters, largest 8 %)``."""
        if not self.units:
            return "root only"
        counts = Counter(type(module).__name__ for _, module in self.units)
        classes = " + ".join(f"{count} {name}" for name, count in counts.items())
        text = f"{classes} ({self.share:.0%} of the parameters, largest {self.largest:.0%})"
        return text.replace("%", " %")


def find_units(model: nn.Module) -> list[Named]:
    """Find the repeated blocks of ``model``, in the order of the model; see ``choose_units``."""
    return list(choose_units(model).units)


def choose_units(model: nn.Module, wrap: Wrap = None) -> Units:
    """Choose the modules of ``model`` that become units. Nothing is changed.

    Args:
        model: on any device, meta too.
        wrap: how to choose.

            - ``None``: modules with children whose class occurs at least twice, and plain
              ``Sequential`` siblings in a ``ModuleList``; the outermost of nested ones; not below
              0.5 % of the parameters.
            - names of classes or of modules, classes (with their subclasses), modules: all that
              match; they may be nested.
            - a number: the smallest modules that bring at least so many parameters, as torch's
              ``size_based_auto_wrap_policy``.
            - ``(name, module) -> bool``: all for which it is true.
            - a policy of ``torch.distributed.fsdp.wrap``.

    Raises:
        InvalidArgument: nothing matches, a module that is not in the model, a number below 1, or
            something else than the above.
    """
    picked = set(pick_modules(model, wrap))
    asked = [(name, module) for name, module in _bottom_up(model) if module in picked]
    called, unread = _without_uncalled(model, asked)
    units, shared = _without_torn(model, called)
    warnings = [*_about_containers(model, asked, automatic=wrap is None), *unread, *shared]
    if not units:
        warnings.append(
            "root only: the whole model is gathered at once, which saves no memory in the forward "
            "pass; name classes with wrap=… "
            f"(there are: {listing(nameable_classes(model))})"
        )
    total = numel(model) or 1
    sizes = _own_sizes(units)
    return Units(tuple(units), sum(sizes) / total, max(sizes, default=0) / total, tuple(warnings))


# ---- what cannot be a unit -----------------------------------------------------------------------


def _without_uncalled(model: nn.Module, asked: Iterable[Named]) -> tuple[list[Named], list[str]]:
    """Leave out what is not called itself: nothing would gather its parameters."""
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    read = {inner for outer in attentions for inner in outer.modules() if inner is not outer}
    warnings = [
        f"{name!r} is no unit: nn.MultiheadAttention reads its weights without calling it"
        for name, module in asked
        if module in read
    ]
    called = [u for u in asked if u[1] not in read and not isinstance(u[1], CONTAINERS)]
    return called, warnings


def _about_containers(model: nn.Module, asked: Iterable[Named], *, automatic: bool) -> list[str]:
    """Name the containers that were asked for; without a wish, those that look like blocks."""
    skipped: dict[str, list[str]] = {}
    for name, module in model.named_modules() if automatic else asked:
        plain = type(module).forward is nn.Module.forward
        if isinstance(module, CONTAINERS) and not (plain and automatic):
            skipped.setdefault(type(module).__name__, []).append(name)
    remedy = "the blocks in them are taken instead" if automatic else "name the classes in them"
    return [
        f"{len(names)} {kind} ({_some(names)}) cannot be units: fully_shard refuses ModuleList, "
        f"ModuleDict and their subclasses; {remedy}"
        for kind, names in skipped.items()
    ]


def _without_torn(model: nn.Module, asked: Iterable[Named]) -> tuple[list[Named], list[str]]:
    """Leave out units that hold one end of a tie only: torch 2.7 silently unties such weights.

    What stays has all ends of a tie or none, so leaving one unit out never harms another.
    """
    ties, prefixes = _ties(model), _prefixes(model)
    kept: list[Named] = []
    warnings: list[str] = []
    for name, module in asked:
        torn = _torn(tuple(prefixes[module]), ties)
        if torn is None:
            kept.append((name, module))
        else:
            warnings.append(
                f"{name!r} is no unit but stays in what is around it: {torn[0]!r} is the same "
                f"parameter as {torn[1]!r}, and all names of one must be in one unit"
            )
    return kept, warnings


def _ties(model: nn.Module) -> list[list[str]]:
    """The names of every parameter that has more than one."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _torn(prefixes: tuple[str, ...], ties: list[list[str]]) -> tuple[str, str] | None:
    """A name of a tied parameter below ``prefixes`` and one elsewhere, if there are both."""
    for names in ties:
        inside = [name for name in names if name.startswith(prefixes)]
        outside = [name for name in names if not name.startswith(prefixes)]
        if inside and outside:
            return inside[0], outside[0]
    return None


# ---- asking the model ----------------------------------------------------------------------------


def _bottom_up(model: nn.Module) -> Iterator[Named]:
    """Every module below the root once, after the modules in it."""
    seen: set[nn.Module] = set()

    def below(module: nn.Module, prefix: str) -> Iterator[Named]:
        for name, child in module.named_children():
            if child not in seen:
                seen.add(child)
                yield from below(child, f"{prefix}{name}.")
                yield prefix + name, child

    return below(model, "")


def _prefixes(model: nn.Module) -> dict[nn.Module, list[str]]:
    """What the names below each module begin with; several where it is used at several places."""
    prefixes: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefixes.setdefault(module, []).append(f"{name}.")
    return prefixes


def _own_sizes(units: Iterable[Named]) -> list[int]:
    """Parameters of each unit without those of the units in it."""
    counted: set[nn.Parameter] = set()
    sizes = []
    for _, module in units:
        own = set(module.parameters()) - counted
        sizes.append(sum(parameter.numel() for parameter in own))
        counted |= own
    return sizes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
