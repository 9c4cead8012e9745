"""A user's model and optimizer from the command line; imported only where a command needs torch."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch

# torch 2.7 cannot import it under the meta device, and a constructor may: torchvision imports it.
import torch._dynamo  # noqa: F401 - so that it is there
from torch import nn
from torch.optim import Optimizer

from torchweld.cli.choices import read_value, split
from torchweld.errors import InvalidArgument, TorchweldError
from torchweld.interfaces import Parts
from torchweld.loop.wiring import needs_closure
from torchweld.model.remaking import operate_all
from torchweld.model.surgery import claimed_slots
from torchweld.plan import Plan
from torchweld.resolving.memory import Memory
from torchweld.setup.launching import build
from torchweld.setup.memory import estimate, parameter_shapes, slots_of
from torchweld.spelling import did_you_mean


def estimate_memory(plan: Plan, *, model: str, optimizer: str, world_size: int) -> Memory:
    """Estimate what ``plan`` holds on each rank; the model is built without memory if it can be.

    Args:
        plan: without errors.
        model: ``"pkg:make"``, a module or a function without arguments that returns one.
        optimizer: a name of ``torch.optim`` or ``"pkg:make"``, with options after colons.
        world_size: number of processes.

    Raises:
        InvalidArgument: either cannot be made.
        PluginError: the strategy, or a surgery, cannot.
    """
    with working_directory():
        made, note = build_model(plan, model)
        slots = measure_slots(optimizer)
    shapes = parameter_shapes(made)
    total = sum(torch.Size(one.shape).numel() for one in shapes.values())
    strategy = build(plan.strategy)
    sizes = estimate(plan.strategy, strategy, shapes, slots, world_size, plan.settings)
    units = describe_units(made, strategy.units(made))
    return Memory(model, total, optimizer, slots, world_size, sizes, note, units)


def describe_units(model: nn.Module, units: Sequence[nn.Module]) -> str:
    """Return how many of which class, and how much of the model they are.

    >>> describe_units(model := nn.Sequential(nn.Linear(3, 1), nn.Linear(3, 1)), list(model))
    '2 Linear (100 % of the parameters, largest 50 %)'
    """
    if list(units) == [model]:
        return ""
    total = sum(parameter.numel() for parameter in model.parameters()) or 1
    sizes = [sum(parameter.numel() for parameter in unit.parameters()) for unit in units]
    held = {id(p): p.numel() for unit in units for p in unit.parameters()}
    counts = Counter(type(unit).__name__ for unit in units)
    named = " + ".join(f"{count} {name}" for name, count in counts.items())
    share, largest = sum(held.values()) / total, max(sizes, default=0) / total
    return f"{named} ({share:.0%} of the parameters, largest {largest:.0%})".replace("%", " %")


@contextmanager
def working_directory() -> Iterator[None]:
    """Import from the working directory meanwhile, as ``python script.py`` would."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


# ---- the model -----------------------------------------------------------------------------------


def build_model(plan: Plan, path: str) -> tuple[nn.Module, str]:
    """Build the model of ``path`` and apply the surgeries of ``plan``.

    Returns:
        The model, and how it was built unless that is on the meta device.

    Raises:
        InvalidArgument: it can be built neither there nor on the CPU.
    """
    given = load(path, "--model")
    if isinstance(given, nn.Module):
        return _operated(plan, given), f"{path} is a module, built when it was imported"
    if not callable(given):
        raise InvalidArgument(
            f"--model {path} is a {type(given).__name__}: name an nn.Module, or a function without "
            "arguments that returns one"
        )
    try:
        with torch.device("meta"):
            model = _made(given, path)
        return _operated(plan, model), ""
    except Exception as error:  # noqa: BLE001 - the user's constructor; said, then tried elsewhere
        on_meta = _first_line(error)
    try:
        shown = textwrap.shorten(on_meta, 160)
        return _operated(plan, _made(given, path)), f"built on the CPU; on the meta device {shown}"
    except TorchweldError:
        raise
    except Exception as error:
        raise InvalidArgument(
            f"--model {path} can be built neither on the meta device ({on_meta}) nor on the CPU "
            f"({_first_line(error)}): it is called without arguments"
        ) from error


def _made(make: Callable[[], Any], path: str) -> nn.Module:
    model = make()
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"--model {path} returned {type(model).__name__}, not an nn.Module")
    return model


def _operated(plan: Plan, model: nn.Module) -> nn.Module:
    surgeries = [
        (chosen, build(chosen))
        for chosen in plan.surgeries
        if "model.modules" in claimed_slots(chosen.claims(plan.settings))
    ]
    parts = Parts(model, torch.nn.functional.cross_entropy)
    model = operate_all(parts, surgeries, plan).parts.model
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise InvalidArgument(
                f"--model: {name!r} is lazy and has no shape yet: run one batch through the model "
                "in the function that returns it"
            )
    return model


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# ---- the optimizer -------------------------------------------------------------------------------


def measure_slots(text: str) -> int:
    """Let an optimizer make one step over a small tensor, and count what it keeps.

    Args:
        text: ``"adamw"``, ``"sgd:momentum=0.9"``, ``"pkg:make:lr=0.1"``.

    Returns:
        The tensors of the parameter's shape; counters and factorised state are small.

    Raises:
        InvalidArgument: no such optimizer, or it cannot be made, or makes no step by itself.
    """
    factory, options = read_optimizer(text)
    weight = nn.Parameter(torch.ones(4, 6))  # two dimensions: some optimizers want a matrix
    weight.grad = torch.ones(4, 6)
    try:
        optimizer = factory([{"params": [weight]}], **options)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"--optimizer {text} cannot be made ({error}): give its arguments, e.g. {text}:lr=0.1"
        ) from error
    if not hasattr(optimizer, "state") or needs_closure(optimizer):
        raise InvalidArgument(
            f"--optimizer {text}: {type(optimizer).__name__} keeps something else than tensors for "
            "each parameter, which cannot be estimated; choose another"
        )
    optimizer.step()
    return slots_of(optimizer)


def read_optimizer(text: str) -> tuple[Callable[..., Any], dict[str, object]]:
    """Find what ``--optimizer`` names, and read its options.

    Raises:
        InvalidArgument: it names nothing, or an option has no value.
    """
    name, *rest = split(text, ":")
    if rest and "=" not in rest[0]:
        factory = load(f"{name}:{rest[0]}", "--optimizer")
        rest = rest[1:]
    else:
        factory = _torch_optimizer(name)
    options: dict[str, object] = {}
    for option in rest:
        key, equals, value = option.partition("=")
        if not equals:
            raise InvalidArgument(f"--optimizer {text}: {option!r} is no option=value")
        options[key.strip()] = read_value(value)
    return factory, options


def _torch_optimizer(name: str) -> Callable[..., Any]:
    known = {
        attribute.lower(): value
        for attribute, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    if name.lower() not in known:
        meant = did_you_mean(name, known) or f"torch.optim has {', '.join(sorted(known))}"
        raise InvalidArgument(f"--optimizer {name}: there is no such optimizer; {meant}")
    return known[name.lower()]


def load(path: str, option: str) -> Any:
    """Import ``"pkg.module:object"``.

    Raises:
        InvalidArgument: no such module or object, or its code raises.
    """
    module, colon, attribute = path.partition(":")
    if not (module and colon and attribute):
        raise InvalidArgument(f"{option} {path}: write module:object, e.g. {option} train:make")
    try:
        return reduce(getattr, attribute.split("."), importlib.import_module(module))
    except Exception as error:
        raise InvalidArgument(f"{option} {path}: {_first_line(error)}") from error
