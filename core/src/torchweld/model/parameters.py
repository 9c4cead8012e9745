"""Which parameters are trained, in which groups, and by whose optimizer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from torchweld.errors import InvalidArgument, RunError
from torchweld.model.names import canonical
from torchweld.spelling import did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from torchweld.interfaces import GroupRule, OptimizerFactory, ParamGroup, Prepared

_FACTORY = "optimizer=functools.partial(torch.optim.SGD, lr=0.1), or any function of the groups"


def owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield every parameter once: canonical name, the module that holds it, the parameter."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield canonical(name), module, parameter


def make_groups(model: nn.Module, rule: GroupRule | None) -> list[ParamGroup]:
    """Sort the parameters of ``model`` into groups of equal hyper-parameters.

    The rule is asked on the whole model, after surgery and before sharding, where shapes still are
    what they say (``p.ndim`` rules collapse under ZeRO-3 and under flat parameters).

    Raises:
        InvalidArgument: the rule returns something else than a mapping.
    """
    groups: list[ParamGroup] = []
    settings: list[Mapping[str, object]] = []
    for name, module, parameter in owned_parameters(model):
        wanted = _asked(rule, name, module, parameter) if rule is not None else {}
        if not isinstance(wanted, Mapping):
            raise InvalidArgument(
                f"param_groups returned {wanted!r} for {name!r}: return a mapping of "
                "hyper-parameters, {} for none"
            )
        if wanted not in settings:
            settings.append(wanted)
            groups.append({"params": [], "names": [], **wanted})
        group = groups[settings.index(wanted)]
        group["params"].append(parameter)
        group["names"].append(name)
    return groups


def _asked(
    rule: GroupRule, name: str, module: nn.Module, parameter: nn.Parameter
) -> Mapping[str, object]:
    try:
        return rule(name, module, parameter)
    except (RuntimeError, NotImplementedError) as error:
        if not parameter.is_meta:
            raise
        raise InvalidArgument(
            f"param_groups reads the values of {name!r}, which the strategy fills in later "
            f"({error}): decide by name and shape, or give the model itself instead of a function"
        ) from error


def without_frozen_groups(groups: Sequence[ParamGroup]) -> tuple[list[ParamGroup], list[str]]:
    """Leave out groups with nothing to train; returns the rest and a note for each left out."""
    kept: list[ParamGroup] = []
    dropped: list[ParamGroup] = []
    for group in groups:
        trained = any(p.requires_grad for p in group["params"])
        (kept if trained else dropped).append(group)
    notes = [
        f"a group of {len(g['names'])} frozen parameters ({g['names'][0]}, …) was left out"
        for g in dropped
    ]
    return kept, notes


# ---- the optimizer the user gave -----------------------------------------------------------------


def as_factory(optimizer: Any, model: nn.Module, rule: GroupRule | None) -> OptimizerFactory | None:
    """Return a factory for what the user gave: a factory, a fresh instance, or nothing.

    Raises:
        InvalidArgument: an instance that cannot be made anew over the prepared parameters.
    """
    if optimizer is None or not isinstance(optimizer, Optimizer):
        if optimizer is not None and not callable(optimizer):
            raise InvalidArgument(f"optimizer={optimizer!r} is no optimizer: give {_FACTORY}")
        return optimizer
    _check_instance(optimizer, model, rule)
    return _rebinding(optimizer)


def _check_instance(optimizer: Optimizer, model: nn.Module, rule: GroupRule | None) -> None:
    name = type(optimizer).__name__
    if optimizer.state:
        raise InvalidArgument(
            f"the {name} instance has already made steps: its state belongs to other parameters "
            f"once the model is changed or wrapped; give {_FACTORY}"
        )
    if len(optimizer.param_groups) > 1 or rule is not None:
        raise InvalidArgument(
            f"the {name} instance has {len(optimizer.param_groups)} parameter groups"
            f"{' and param_groups= was given too' if rule else ''}: parameters may be replaced "
            f"before training, so give {_FACTORY}, and the groups as param_groups=rule"
        )
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    strangers = held - {id(p) for p in model.parameters()}
    if strangers:
        raise InvalidArgument(
            f"the {name} instance holds {len(strangers)} parameters that are not the model's and "
            f"would not be trained: make them part of the model, or give {_FACTORY}"
        )
    if trainable - held:
        raise InvalidArgument(
            f"the {name} instance holds {len(held & trainable)} of the model's {len(trainable)} "
            "trainable parameters: freeze the others (requires_grad=False), then give all; or "
            f"give {_FACTORY}"
        )


def _rebinding(optimizer: Optimizer) -> OptimizerFactory:
    def bind(groups: list[ParamGroup]) -> Optimizer:
        hyper = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        optimizer.param_groups.clear()
        for group in groups:
            optimizer.add_param_group({**hyper, **group})
        return optimizer

    return bind


class CheckedFactory:
    """The user's factory, with errors that say who made what; called by strategies.

    Attributes:
        made: class of the optimizer that it made last, which a strategy may wrap; "" before.
    """

    def __init__(self, factory: OptimizerFactory) -> None:
        self._factory = factory
        self.made = ""

    def __call__(self, groups: list[ParamGroup]) -> Optimizer:
        """Make the optimizer of ``groups``.

        Raises:
            InvalidArgument: it cannot be made of them, or is none.
        """
        try:
            made = self._factory(groups)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(
                f"optimizer= cannot be made of the parameter groups ({error}): give {_FACTORY}"
            ) from error
        if not hasattr(made, "param_groups"):
            raise InvalidArgument(
                f"optimizer= returned {type(made).__name__}, no optimizer: give {_FACTORY}"
            )
        self.made = type(made).__name__
        return made


# ---- checks --------------------------------------------------------------------------------------


def check_groups(groups: Sequence[ParamGroup], model: nn.Module) -> None:
    """Check before wrapping that every trainable parameter is in exactly one group (TW503).

    Raises:
        RunError: names the parameters in none or in two.
    """
    names = [name for group in groups for name in group["names"]]
    trainable = [n for n, _, p in owned_parameters(model) if p.requires_grad]
    if not trainable:
        raise RunError("the model has no trainable parameter: every requires_grad is False")
    _refuse_uncovered(names, trainable)


def check_trained(prepared: Prepared, groups: Sequence[ParamGroup]) -> list[list[str]]:
    """Check after ``setup`` that the optimizer holds every trainable parameter exactly once.

    Args:
        groups: what the optimizer was to be made of.

    Returns:
        The names in each group of the optimizer, which may have split what it was given.

    Raises:
        RunError: names the parameters that would not be trained, or be stepped twice, or with
            hyper-parameters that were meant for others.
    """
    assert prepared.optimizer is not None
    held = _names_held(prepared)
    names = [name for group in held for name in group]
    strangers = names.count("")
    if strangers:
        raise RunError(
            f"TW503  the optimizer holds {strangers} parameters that are not the model's: it was "
            f"made before the model was changed or wrapped; give {_FACTORY}"
        )
    trainable = [canonical(n) for n, p in prepared.named_parameters() if p.requires_grad]
    _refuse_uncovered(names, trainable)
    _refuse_mixed(held, groups)
    _refuse_misspelt(prepared.optimizer, groups)
    return held


def _names_held(prepared: Prepared) -> list[list[str]]:
    if prepared.optimizer_names is not None:
        return [[canonical(name) for name in names] for names in prepared.optimizer_names]
    assert prepared.optimizer is not None
    by_id = {id(p): canonical(n) for n, p in prepared.named_parameters()}
    return [[by_id.get(id(p), "") for p in g["params"]] for g in prepared.optimizer.param_groups]


def _refuse_mixed(held: Sequence[Sequence[str]], groups: Sequence[ParamGroup]) -> None:
    place = {name: number for number, group in enumerate(groups) for name in group["names"]}
    for names in held:
        one_of_each = {place[name]: name for name in names if name in place}
        if len(one_of_each) > 1:
            first, second, *_ = one_of_each.values()
            raise RunError(
                f"TW503  the optimizer has {first!r} and {second!r} in one group, though "
                "param_groups= asks for different hyper-parameters: make it of the groups it is "
                f"given, e.g. {_FACTORY}"
            )


def _refuse_misspelt(optimizer: Optimizer, groups: Sequence[ParamGroup]) -> None:
    """Refuse a typo: torch keeps hyper-parameters that it does not know and never looks at them."""
    known = getattr(optimizer, "defaults", {}).keys()
    for name in {name for group in groups for name in group} - known - {"params", "names"}:
        meant = did_you_mean(name, known)
        if meant:
            raise InvalidArgument(
                f"param_groups gave {name!r}, which {type(optimizer).__name__} does not have: "
                f"{meant}"
            )


def _refuse_uncovered(names: Sequence[str], trainable: Sequence[str]) -> None:
    counts = Counter(names)
    missing = sorted(set(trainable) - counts.keys())
    double = sorted(name for name, count in counts.items() if count > 1)
    if missing or double:
        what = [f"in no group: {', '.join(missing[:5])}"] if missing else []
        what += [f"in two: {', '.join(double[:5])}"] if double else []
        raise RunError(
            f"TW503  {len(missing) + len(double)} trainable parameters are {'; '.join(what)}: the "
            f"optimizer must be made of the groups it is given, e.g. {_FACTORY}"
        )


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let no parameter take a gradient meanwhile; those that took one do so again afterwards."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class TrainableWatch:
    """Notices parameters that are frozen or unfrozen while a run goes on."""

    def __init__(self, named_parameters: Iterable[tuple[str, Any]]) -> None:
        self._named = [(canonical(name), parameter) for name, parameter in named_parameters]
        self._flags = [parameter.requires_grad for _, parameter in self._named]

    def changes(self) -> tuple[list[str], list[str]]:
        """Names that became trainable and names that were frozen since the last call."""
        flags = [parameter.requires_grad for _, parameter in self._named]
        if flags == self._flags:
            return [], []
        pairs = list(zip(self._named, self._flags, flags, strict=True))
        self._flags = flags
        thawed = [name for (name, _), before, now in pairs if now and not before]
        return thawed, [name for (name, _), before, now in pairs if before and not now]


def model_lines(model: nn.Module) -> list[str]:
    """One line a parameter and buffer: what every rank must have alike."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [
        f"{canonical(n)} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
        f"{'' if t.requires_grad or not t.is_floating_point() else ' fixed'}"
        for n, t in tensors
    ]


def model_digest(lines: Sequence[str]) -> str:
    """A short digest of :func:`model_lines`."""
    return hashlib.sha256(json.dumps(list(lines)).encode()).hexdigest()


def check_materialised(model: nn.Module) -> None:
    """Refuse a model whose weights hold no values yet.

    Raises:
        RunError: on the meta device, or lazy modules that never saw a batch.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise RunError(
                f"{name!r} is lazy and has no shape yet: run one batch through the model first"
            )
        if tensor.is_meta:
            raise RunError(
                f"{name!r} is on the meta device and nothing fills it: build the model on the CPU, "
                "or give init_weights=…"
            )
