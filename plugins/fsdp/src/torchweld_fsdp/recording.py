"""Run a constructor on the meta device and record what it does to tensors."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from torchweld_fsdp.tape import Op, Tape, View

aten = torch.ops.aten
_OVERWRITING = {aten.normal_, aten.uniform_, aten.fill_, aten.zero_, aten.copy_}
_OF_DATA = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
_SHARING = {torch.as_tensor, torch.asarray}  # may share memory with what they are given
# eigvalsh, svdvals and norms ask for vectors too where a mode is active: other last bits.
_OTHERWISE = {aten._linalg_eigh, aten._linalg_svd, aten.linalg_eig}


class NotDeferrable(Exception):
    """The constructor does what cannot be recorded."""


class DataKept(TorchFunctionMode):
    """Keeps what would be lost on the meta device: values from Python, and initialisations.

    ``is_meta`` is False inside, because ``nn.init`` of torch 2.13 does nothing where it is True.

    Attributes:
        failure: the first error of a torch function; the constructor may have caught it and gone
            another way than on the CPU.
    """

    failure = ""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func == Tensor.is_meta.__get__:  # type: ignore[attr-defined]  # a property written in C
            return False
        try:
            return self._called(func, args, kwargs or {})
        except Exception as error:
            self.failure = self.failure or first_sentence(error)
            raise

    def _called(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func == Tensor.new and not all(isinstance(a, (int, torch.Size)) for a in args[1:]):
            raise NotDeferrable("Tensor.new was given values: use torch.tensor")
        if func not in _OF_DATA or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        place = 1 if func == Tensor.new_tensor else 0
        if len(args) > place and isinstance(args[place], Tensor):
            return func(*args, **{**kwargs, "device": args[place].device})
        made = func(*args, **{**kwargs, "device": "cpu"})
        if func in _SHARING:
            return made
        return made.detach().to("meta").requires_grad_(made.requires_grad)


class Recorder(TorchDispatchMode):
    """Records what happens to tensors on the meta device; others are left alone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no hints
        self.tape = Tape()
        self.made: list[weakref.ref[Tensor]] = []
        self._generators: dict[torch.Generator, Tensor] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        self._remember(leaves)
        if not any(is_meta(leaf) for leaf in leaves):
            return func(*args, **kwargs)
        return self._without_values(func, args, kwargs)

    def _without_values(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if _asks_for_values(func, args, kwargs):
            return self._with_values(func, args, kwargs)
        if func.overloadpacket in _OTHERWISE:
            raise NotDeferrable(f"{func.overloadpacket} may give other bits while recorded")
        overwritten = func.overloadpacket in _OVERWRITING and _covers_its_storage(args[0])
        described = tree_map(self._describe, (args, kwargs))
        try:
            out = func(*args, **kwargs)
        except NotImplementedError:
            # Not made for the meta device (geqrf), or of a shape that values decide (nonzero).
            if func._schema.is_mutable or _draws(func):
                raise
            out = tree_map_only(Tensor, _like, self._with_values(func, args, kwargs))
        self._record(func, described, overwritten, out)
        return out

    def _with_values(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        args, kwargs = tree_map_only(Tensor, self.value, (args, kwargs))
        return func(*args, **kwargs)

    def value(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` with the values that it would have now."""
        return self.tape.value(tensor) if is_meta(tensor) else tensor

    def restore_generators(self) -> None:
        """Put the generators that were given to operations back to where they were."""
        for generator, state in self._generators.items():
            generator.set_state(state)

    def _remember(self, leaves: Sequence[object]) -> None:
        for leaf in leaves:
            if isinstance(leaf, torch.Generator) and leaf not in self._generators:
                self._generators[leaf] = leaf.get_state()

    def _describe(self, leaf: object) -> object:
        if isinstance(leaf, (torch.UntypedStorage, torch.TypedStorage)):
            raise NotDeferrable("a storage is used without its tensor")
        if not isinstance(leaf, Tensor):
            return leaf
        if not is_meta(leaf):
            return leaf.detach().clone()  # it may change before it is used
        return self.tape.view(leaf)

    def _record(self, func: Any, described: Any, overwritten: bool, out: Any) -> None:
        args, kwargs = described
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.made += [weakref.ref(tensor) for tensor in made]
        outputs = tuple(self.tape.view(tensor) for tensor in made)
        given = _storages((args, kwargs))
        writes = _mutated(func, args, kwargs) | (_storages(outputs) - given)
        if not writes:
            return  # a view: whoever uses it is described by the storage
        reads = _storages((args[1:], kwargs)) if overwritten else given
        op = Op(func, args, kwargs, reads, writes, outputs)
        if _draws(func):
            drawn = [g for g in tree_leaves((args, kwargs)) if isinstance(g, torch.Generator)]
            generator = drawn[0] if drawn else torch.default_generator
            op = replace(op, generator=generator, state=generator.get_state())
        self.tape.append(op)


def is_meta(leaf: object) -> bool:
    """Whether a tensor or device is meta; ``tensor.is_meta`` is False while recording."""
    device = leaf.device if isinstance(leaf, Tensor) else leaf
    return isinstance(device, torch.device) and device.type == "meta"


def _draws(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _like(tensor: Tensor) -> Tensor:
    """A tensor without values in the layout of ``tensor``."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def first_sentence(error: Exception) -> str:
    """What ``error`` says, in short, and of which kind it is unless it is ours."""
    said = str(error).partition(". ")[0]
    return said if isinstance(error, NotDeferrable) else f"{type(error).__name__}: {said}"


def _asks_for_values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether values go elsewhere: ``item``, ``bool``, ``tolist``, ``cpu``, into a real tensor."""
    if func is aten._to_copy.default:
        return kwargs.get("device") is not None and not is_meta(kwargs["device"])
    if func is aten.copy_.default:
        return not is_meta(args[0])
    returned = [str(value.type) for value in func._schema.returns]
    return bool(returned) and not any("Tensor" in kind for kind in returned)


def _covers_its_storage(tensor: Tensor) -> bool:
    num_bytes = tensor.numel() * tensor.element_size()
    return tensor.is_contiguous() and num_bytes == tensor.untyped_storage().nbytes()


def _storages(tree: Any) -> frozenset[int]:
    return frozenset(leaf.storage for leaf in tree_leaves(tree) if isinstance(leaf, View))


def _mutated(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> frozenset[int]:
    values = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            values.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return _storages(values)
