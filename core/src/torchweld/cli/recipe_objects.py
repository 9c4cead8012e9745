"""From the names in a recipe to the objects that they mean, checked before anything is called."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, make_dataclass
from functools import partial, reduce
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from torchweld import callbacks
from torchweld.cli.recipe import CHOICES, DATA, SEVERAL, Named, Recipe
from torchweld.components import Use
from torchweld.errors import InvalidArgument
from torchweld.guard import attempt
from torchweld.loop.schedules import LRSchedule
from torchweld.plugins.options import build_options
from torchweld.spelling import closest, did_you_mean
from torchweld.trainer import Trainer

_WHEN = ("interval", "monitor")
_TOTALS = ("total_steps", "T_max")
"""What torch's schedulers call the length of the run."""
_LENGTH = frozenset({"epochs", "steps_per_epoch"})
"""OneCycleLR's other way to say it."""


def trainer_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of ``Trainer``, typed, with callbacks and loggers made.

    Raises:
        InvalidArgument: an argument is unknown or of another type.
    """
    plain = {key: v for key, v in recipe.trainer.items() if key not in {"callbacks", "logger"}}
    for key in CHOICES:
        if key in plain:
            plain[key] = _choice(plain[key], recipe.folder)
    made = check_arguments("trainer", Trainer, plain, leave_out=("registry",))
    for key in ("callbacks", "logger"):
        given = recipe.trainer.get(key)
        if isinstance(given, list):
            made[key] = [_callback(one, recipe.folder) for one in given]
        elif given is not None:
            made[key] = given
    return made


def fit_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of ``fit``; the data is loaded by this, the model is not built.

    Raises:
        InvalidArgument: an object cannot be found, or does not take its arguments.
    """
    found: dict[str, Any] = {}
    for key, value in recipe.fit.items():
        if isinstance(value, Named):
            found[key] = _object(key, value, recipe.folder)
        elif key in SEVERAL:
            found[key] = {name: _object(key, one, recipe.folder) for name, one in value.items()}
        else:
            found[key] = value
    if "datasets" in found:
        found["train"], found["val"] = _pair(found.pop("datasets"))
    return found


def look_up(recipe: Recipe) -> list[tuple[str, str]]:
    """Find every object and check the arguments of those of ``fit``; none of them is called.

    Returns:
        Pairs of place and meaning, for the screen.
    """
    lines = []
    for value in recipe.fit.values():
        for one in value.values() if isinstance(value, dict) else [value]:
            if isinstance(one, Named):
                _checked(one.where.partition(".")[0], one, recipe.folder)
                lines.append((one.where, _shown(one)))
    for key in ("callbacks", "logger"):
        given = recipe.trainer.get(key)
        lines += [(one.where, _shown(one)) for one in (given if isinstance(given, list) else [])]
    return lines


def _shown(value: object) -> str:
    """A value as it is printed; an object as the call that makes it."""
    if not isinstance(value, Named):
        return repr(value)
    given = ", ".join(f"{key}={_shown(item)}" for key, item in value.arguments.items())
    return f"{value.path}({given})" if given else value.path


def _pair(made: Any) -> tuple[Any, Any]:
    if isinstance(made, (tuple, list)) and len(made) == 2:
        return made[0], made[1]
    raise InvalidArgument(f"datasets returned {type(made).__name__}: return the pair (train, val)")


# ---- names -------------------------------------------------------------------------------------


def find(named: Named, folder: Path, names: Mapping[str, Any]) -> Any:
    """Return the object that ``named`` means.

    Args:
        named: of the recipe.
        folder: where files are looked for.
        names: what may be named without a module.

    Raises:
        InvalidArgument: there is no such module, file or object; says which was meant.
    """
    place, colon, attribute = named.path.rpartition(":")
    if not colon:
        by_spelling = {name.lower(): value for name, value in names.items()}
        if named.path.lower() in by_spelling:
            return by_spelling[named.path.lower()]
        written = {name.lower(): name for name in names}
        meant = written.get(closest(named.path, by_spelling))
        raise InvalidArgument(
            f"{named.where} = {named.path!r}: there is no such name; "
            + (f"did you mean {meant!r}?" if meant else 'write "module:object" or "file.py:object"')
        )
    module = _module(named, place, folder)
    try:
        return reduce(getattr, attribute.split("."), module)
    except AttributeError:
        meant = did_you_mean(attribute, vars(module))
        raise InvalidArgument(
            f"{named.where} = {named.path!r}: {place} has no {attribute!r}; "
            + (meant or "look for its name there")
        ) from None


def _module(named: Named, place: str, folder: Path) -> ModuleType:
    load = (
        partial(_load_file, folder / place)
        if place.endswith(".py")
        else partial(importlib.import_module, place)
    )
    try:
        return load()
    except ImportError as error:
        raise InvalidArgument(f"{named.where} = {named.path!r}: {error}") from error


def _load_file(path: Path) -> ModuleType:
    """Import a file under its own name, once; what lies beside it can be imported by it."""
    path = path.resolve()
    if not path.is_file():
        raise ImportError(f"there is no file {path}")
    name = path.stem
    if getattr(sys.modules.get(name), "__file__", str(path)) != str(path):
        # Another module has this name; the one of a path is the same in every process.
        name += f"_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _classes(module: ModuleType, base: type) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, base) and value is not base
    }


_LOSSES = {
    **{n: f for n, f in vars(nn.functional).items() if n.endswith(("_loss", "cross_entropy"))},
    **{n: c for n, c in _classes(nn, nn.Module).items() if n.endswith("Loss")},
}
_CALLBACKS = {name: getattr(callbacks, name) for name in callbacks.__all__}
_NAMES: Mapping[str, Mapping[str, Any]] = {
    "optimizer": _classes(torch.optim, torch.optim.Optimizer),
    "lr_scheduler": _classes(torch.optim.lr_scheduler, LRScheduler),
    "loss": {name: value for name, value in _LOSSES.items() if not name.startswith("_")},
}


# ---- arguments ---------------------------------------------------------------------------------


def check_arguments(
    where: str, target: Any, given: Mapping[str, object], *, leave_out: Iterable[str] = ()
) -> dict[str, Any]:
    """Return ``given`` in the types that ``target`` is annotated with.

    Args:
        where: place in the recipe.
        target: what is called with them; one that takes any keyword takes these.
        given: by name.
        leave_out: parameters that somebody else gives.

    Raises:
        InvalidArgument: an argument is unknown, with what was probably meant, or of another type.
    """
    signature = attempt(inspect.signature, target).value
    if not given or signature is None:
        return dict(given)
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(given)
    annotated = target.__init__ if inspect.isclass(target) else target
    hints = attempt(get_type_hints, annotated).value or {}
    named = [p for p in parameters if p.kind is not p.POSITIONAL_ONLY and p.name not in leave_out]
    fields = [(p.name, hints.get(p.name, Any), field(default=None)) for p in named]
    values, problems = build_options(where, make_dataclass(where, fields), given)
    if problems:
        told = [f"{p.what}: {p.fix or p.why}" for p in problems]
        raise InvalidArgument("\n  - ".join(["the recipe cannot be used:", *told]))
    return {key: getattr(values, key) for key in given}


def _object(key: str, named: Named, folder: Path) -> Any:
    target, arguments = _checked(key, named, folder)
    if key in DATA:
        return target(**arguments) if _is_maker(target) else target
    if key == "lr_scheduler":
        return _schedule(target, arguments, _when(named))
    if key in {"model", "optimizer"}:  # called later: after seeding, after wrapping
        return partial(target, **arguments) if arguments else target
    if inspect.isclass(target):
        return target(**arguments)
    return partial(target, **arguments) if arguments else target


def _checked(key: str, named: Named, folder: Path) -> tuple[Any, dict[str, Any]]:
    target = find(named, folder, _NAMES.get(key, {}))
    if named.arguments and not callable(target):
        raise InvalidArgument(
            f"{named.where}: {named.path} is a {type(target).__name__}, which takes no arguments"
        )
    left_out = _WHEN if key == "lr_scheduler" else ()
    given = {name: value for name, value in named.arguments.items() if name not in left_out}
    if inspect.isclass(target) and issubclass(target, LRScheduler):
        _refuse_two_lengths(named, target)
    given = _values(given, folder)
    return target, check_arguments(named.where, target, given, leave_out=_FIRST.get(key, ()))


def _values(given: Mapping[str, object], folder: Path) -> dict[str, Any]:
    """Arguments with the objects that some of them name: a class is called, a function is not."""
    return {
        key: _object("", value, folder) if isinstance(value, Named) else value
        for key, value in given.items()
    }


def _choice(chosen: Any, folder: Path) -> Any:
    """One choice of components, or a list of them, with the objects that it names."""
    if isinstance(chosen, list):
        return [_choice(one, folder) for one in chosen]
    if not isinstance(chosen, Use):
        return chosen
    name = find(chosen.name, folder, {}) if isinstance(chosen.name, Named) else chosen.name
    return Use(name, _values(chosen.options, folder))


_FIRST: Mapping[str, tuple[str, ...]] = {"optimizer": ("params",), "lr_scheduler": ("optimizer",)}
"""Parameters that core gives."""


def _is_maker(target: Any) -> bool:
    """Whether data is made by a call; a Dataset, a loader or a list is there already."""
    return inspect.isclass(target) or inspect.isroutine(target) or isinstance(target, partial)


def _callback(named: Named, folder: Path) -> Any:
    target = find(named, folder, _CALLBACKS)
    arguments = check_arguments(named.where, target, _values(named.arguments, folder))
    return target(**arguments) if _is_maker(target) else target


def _when(named: Named) -> dict[str, Any]:
    """What a recipe says of a schedule beside its arguments: when it is stepped."""
    return {key: named.arguments[key] for key in _WHEN if key in named.arguments}


def _schedule(target: Any, arguments: dict[str, Any], when: dict[str, Any]) -> Any:
    """What ``fit`` takes: a factory, with ``when`` it is stepped where the recipe says that."""
    if inspect.isclass(target) and issubclass(target, LRScheduler):
        target = _factory(target, arguments)
    elif arguments:
        target = partial(target, **arguments)
    return LRSchedule(target, **when) if when else target


def _factory(target: type[LRScheduler], arguments: dict[str, Any]) -> Callable[..., LRScheduler]:
    """``(optimizer, total_steps) -> scheduler``; torch's classes are told the length of the run."""
    wanted = [n for n in _TOTALS if n in inspect.signature(target).parameters]
    if arguments.keys() >= _LENGTH:
        wanted = []  # torch would take total_steps and leave these two unread
    lacking = [n for n in wanted if n not in arguments]

    def make(optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
        return target(optimizer, **arguments, **dict.fromkeys(lacking, total_steps))

    return make


def _refuse_two_lengths(named: Named, target: type[LRScheduler]) -> None:
    """Refuse what torch would silently not read beside ``total_steps``, given or filled in."""
    given = _LENGTH & named.arguments.keys()
    if not given & inspect.signature(target).parameters.keys():
        return
    if "total_steps" in named.arguments or given != _LENGTH:
        raise InvalidArgument(
            f"{named.where}: {' and '.join(sorted(given))} would not be read beside total_steps; "
            "leave it out (total_steps is filled in), or give epochs and steps_per_epoch alone"
        )
