"""Activation checkpointing and compilation of a model's units: in place, no name changes.

Both are put on the unit itself and change neither its class nor the name of a parameter, so that
checkpoints, exports and optimizer groups are those of the bare model. A unit's ``forward`` becomes
one that forgets its activations, then the call of the unit is compiled, that forward within it.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174;
Ansel et al. 2024, "PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode
Transformation and Graph Compilation".
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from torchweld.errors import InvalidArgument, RunError
from torchweld.model.blocks import CONTAINERS, repeated_blocks
from torchweld.spelling import did_you_mean, listing

if TYPE_CHECKING:
    from torchweld.components import CheckpointingOptions, CompileOptions, Settings

_COMPILED = "_torchweld_compiled"
"""Where a unit says that it was compiled here; what is compiled itself cannot be pickled."""


def prepare_units(
    model: nn.Module,
    units: Sequence[nn.Module],
    settings: Settings,
    device: torch.device,
    *,
    trains: bool,
) -> list[str]:
    """Checkpoint the activations of the units, then compile them; undo what an earlier run did.

    Args:
        model: whole, bare, not wrapped.
        units: of the strategy; of nested ones the innermost are taken.
        settings: of the run.
        device: where the model will be.
        trains: without a backward there is nothing to compute again.

    Returns:
        Notes on what was decided.

    Raises:
        InvalidArgument: an option that fits nothing here.
        RunError: this machine cannot compile.
    """
    restore_units(model)
    again, compiled = settings.activation_checkpointing, settings.compile
    if again is None and compiled is None:
        return []
    notes: list[str] = []
    _refuse_compiled(model)
    if again is not None and trains:
        chosen = _chosen(model, units, again.units, "activation_checkpointing")
        _check_together(chosen, compiled)
        notes.append(_checkpoint_all(model, chosen, again))
    if compiled is not None:
        check_compiler(compiled, device)
        chosen = _chosen(model, units, compiled.units, "compile")
        arguments = _compile_arguments(compiled, checkpoints=again is not None and trains)
        for unit in chosen:
            _compile(unit, arguments)
        notes.append(f"compile: {_described(model, chosen)}")
    return notes


def restore_units(model: nn.Module) -> None:
    """Take everything back that :func:`prepare_units` put on the modules of ``model``."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        function: Any = getattr(forward, "__func__", None)
        if hasattr(function, "torchweld_replaced"):
            del module.__dict__["forward"]
            if function.torchweld_replaced is not None:
                module.__dict__["forward"] = function.torchweld_replaced
        if module.__dict__.pop(_COMPILED, False):
            module._compiled_call_impl = None


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise InvalidArgument(
                f"the module {name or 'itself'!r} of the model is compiled already, so that what "
                "is put into it now would be left out of its graph: give the model as it was, and "
                "let compile= do it"
            )


# ---- which ---------------------------------------------------------------------------------------


def _chosen(
    model: nn.Module, units: Sequence[nn.Module], names: str | tuple[str, ...], setting: str
) -> list[nn.Module]:
    """What the user named; else the strategy's units, or the blocks of what it leaves whole."""
    names = (names,) if isinstance(names, str) else names
    if names:
        found = [module for name in names for module in _named(model, name, setting)]
    else:
        found = repeated_blocks(model) or [model] if list(units) == [model] else list(units)
    usable = list(dict.fromkeys(m for m in found if not isinstance(m, CONTAINERS)))
    return [m for m in usable if not any(o is not m and o in set(m.modules()) for o in usable)]


def _named(model: nn.Module, name: str, setting: str) -> list[nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if name in modules:
        return [modules[name]]
    found = [m for m in modules.values() if name in {kind.__name__ for kind in type(m).__mro__}]
    if not found:
        classes = {type(module).__name__ for module in modules.values()}
        meant = did_you_mean(name, [*classes, *modules]) or f"its classes are: {listing(classes)}"
        raise InvalidArgument(
            f"{setting}: units={name!r} is no class or module of the model; {meant}"
        )
    return found


def _described(model: nn.Module, chosen: Sequence[nn.Module]) -> str:
    if list(chosen) == [model]:
        return "the whole model"
    counts: dict[str, int] = {}
    for unit in chosen:
        counts[type(unit).__name__] = counts.get(type(unit).__name__, 0) + 1
    return " + ".join(f"{count} {name}" for name, count in counts.items())


# ---- activation checkpointing --------------------------------------------------------------------


def _checkpoint_all(
    model: nn.Module, chosen: list[nn.Module], options: CheckpointingOptions
) -> str:
    if chosen == [model]:
        raise InvalidArgument(
            "activation_checkpointing was asked for, and the model has no repeated blocks: "
            "computed again as a whole it would need as much memory as before; name its large "
            "parts with activation_checkpointing={'units': [class or module names]}"
        )
    some = chosen[options.every - 1 :: options.every]
    if not some:
        raise InvalidArgument(
            f"activation_checkpointing: every={options.every} leaves out all {len(chosen)} units: "
            "give a smaller number"
        )
    for unit in some:
        _refuse_inner_state(unit)
        _checkpoint(unit, options)
    return f"activation checkpointing: {_described(model, some)}"


def _checkpoint(unit: nn.Module, options: CheckpointingOptions) -> None:
    """Give ``unit`` a forward that keeps its inputs only, and runs again in the backward pass."""
    replaced = unit.__dict__.get("forward")
    function, takes_self = replaced, replaced is None
    if isinstance(replaced, MethodType) and replaced.__self__ is unit:
        function, takes_self = replaced.__func__, True  # so that a copy of the unit calls itself
    arguments: dict[str, Any] = {
        "use_reentrant": False,  # the other way needs inputs with gradients and ignores keywords
        "preserve_rng_state": options.preserve_rng_state,
        "determinism_check": options.determinism_check,
    }
    context_fn = _contexts(unit, options.context_fn)
    if context_fn is not None:
        arguments["context_fn"] = context_fn

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = type(self).forward if function is None else function
        if takes_self:
            args = (self, *args)
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        return checkpoint(original, *args, **arguments, **kwargs)

    forward.torchweld_replaced = replaced  # type: ignore[attr-defined]  # where restore_units looks
    # A bound method: a deep copy of the unit is bound to the copy, and pickle looks up "forward".
    unit.__dict__["forward"] = MethodType(forward, unit)


def _contexts(unit: nn.Module, asked: Callable[[], Any] | None) -> Callable[[], Any] | None:
    """What forward and recomputation run in; None for nothing."""
    if not any(True for _ in _statistics(unit)):
        return asked

    def contexts() -> Any:
        outer = asked() if asked is not None else (nullcontext(), nullcontext())
        return outer[0], _joined(outer[1], _statistics_kept(unit))

    return contexts


@contextmanager
def _joined(*contexts: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _statistics(unit: nn.Module) -> Iterator[nn.Module]:
    """The layers whose forward changes running statistics."""
    for module in unit.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            yield module


@contextmanager
def _statistics_kept(unit: nn.Module) -> Iterator[None]:
    """Let the recomputation change copies: it would count every batch twice."""
    kept = [(module, dict(module._buffers)) for module in _statistics(unit)]
    for module, buffers in kept:
        module._buffers.update({n: None if b is None else b.clone() for n, b in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)


def _refuse_inner_state(unit: nn.Module) -> None:
    """Refuse layers that come out differently the second time, without a word."""
    for name, module in unit.named_modules():
        hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
        if type(module).__name__ == "_SpectralNorm" or "SpectralNorm" in hooks:
            raise InvalidArgument(
                f"activation_checkpointing: {name!r} of a {type(unit).__name__} has spectral norm, "
                "which takes a step in each forward, so that the second one has other weights: "
                "choose other units"
            )


def _check_together(chosen: Sequence[nn.Module], compiled: CompileOptions | None) -> None:
    """Refuse what is wrong or impossible in a compiled graph with checkpointed regions."""
    if compiled is None:
        return
    if compiled.backend == "eager":
        raise InvalidArgument(
            "activation_checkpointing with compile={'backend': 'eager'}: that backend draws other "
            "random numbers in the recomputation (measured on torch 2.13: gradients 65 % off with "
            "dropout); choose 'aot_eager' or 'inductor'"
        )
    layers = [(unit, layer) for unit in chosen for layer in _statistics(unit)]
    if layers:
        unit, layer = (type(module).__name__ for module in layers[0])
        raise InvalidArgument(
            f"activation_checkpointing and compile together, and {unit} has a {layer}, whose "
            "running statistics a compiled graph would change a second time in the recomputation: "
            "choose one of the two, or another normalisation"
        )


# ---- compilation ---------------------------------------------------------------------------------


def check_compiler(options: CompileOptions, device: torch.device) -> None:
    """Refuse to compile where what writes the code is missing.

    Raises:
        InvalidArgument: no such backend.
        RunError: inductor without a C++ compiler on a CPU.
    """
    if isinstance(options.backend, str):
        known = torch.compiler.list_backends(exclude_tags=())
        if options.backend not in known:
            meant = did_you_mean(options.backend, known) or f"there are: {listing(known)}"
            raise InvalidArgument(f"compile: there is no backend {options.backend!r}; {meant}")
    compiler = os.environ.get("CXX", "g++")
    if options.backend == "inductor" and device.type == "cpu" and shutil.which(compiler) is None:
        raise RunError(
            f"compile was asked for, and the C++ compiler {compiler!r} that torch.compile needs on "
            "a CPU is not installed: install g++ (or name another one in the variable CXX), or "
            "leave compile out"
        )


def _compile_arguments(options: CompileOptions, *, checkpoints: bool) -> dict[str, Any]:
    arguments = {
        "backend": options.backend,
        "mode": options.mode,
        "dynamic": options.dynamic,
        "fullgraph": options.fullgraph,
        "options": None if options.options is None else dict(options.options),
    }
    plain = options.mode is None and options.options is None and options.backend == "inductor"
    if checkpoints and plain and TorchVersion(torch.__version__) < "2.13":
        # torch 2.7 fails to part a graph with dropout in such a region ("Node … was invalid"), 2.13
        # does not, what is between was not tried. Eager's random numbers cost a fused kernel only.
        arguments["options"] = {"fallback_random": True}
    return arguments


def _compile(unit: nn.Module, arguments: dict[str, Any]) -> None:
    try:
        unit.compile(**arguments)
    except (RuntimeError, TypeError, AttributeError) as error:
        given = {name: value for name, value in arguments.items() if value not in (None, False)}
        raise InvalidArgument(f"compile: torch.compile refuses {given}: {error}") from error
    unit.__dict__[_COMPILED] = True
