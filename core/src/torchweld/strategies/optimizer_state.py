"""Optimizer state by parameter name, as pieces: tensors as they are, the rest as JSON bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchweld.checkpoint import decode, encode
from torchweld.interfaces import Shard, ShardReader

if TYPE_CHECKING:
    from torch.optim import Optimizer

_JSON = "!json"


ToShards = Callable[[str, Tensor, Any], Iterable[Shard]]
"""``(name, tensor, parameter) ->`` what this rank writes of one tensor of a parameter's state."""

ReadTensor = Callable[[ShardReader, str, Any], Tensor]
"""``(reader, name, parameter) ->`` what this rank keeps of one tensor of a parameter's state."""


def optimizer_shards(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Any]],
    to_shards: ToShards | None = None,
    *,
    writes_values: bool = True,
) -> Iterator[Shard]:
    """Yield the state of every parameter as ``optim/<name>/<key>``.

    Args:
        optimizer: whose state.
        named_parameters: names, and what the optimizer holds under each.
        to_shards: where a rank holds pieces; None: this rank writes every tensor whole.
        writes_values: whether this rank is the one that writes values that are no tensors.

    A value that is no tensor (LBFGS keeps lists and counts) becomes ``<key>!json``, its text as
    bytes, and ``<key>!<number>``, the tensors in it.
    """
    for name, parameter in named_parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield from (to_shards or whole)(f"optim/{name}/{key}", value, parameter)
            elif writes_values:
                yield from _value_shards(f"optim/{name}/{key}", value)


def _value_shards(name: str, value: Any) -> Iterator[Shard]:
    encoded, parts = encode(value, "optimizer state")
    for number, tensor in enumerate(parts.values()):
        yield from whole(f"{name}!{number}", tensor, None)
    text = json.dumps({"value": encoded, "tensors": list(parts)})
    yield from whole(name + _JSON, torch.tensor(list(text.encode()), dtype=torch.uint8), None)


def whole(name: str, tensor: Tensor, _parameter: Any) -> Iterator[Shard]:
    """One shard: all of ``tensor``."""
    yield Shard(name, tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim())


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors that the optimizer keeps for its parameters."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def restore_optimizer(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Any]],
    reader: ShardReader,
    read: ReadTensor | None = None,
) -> None:
    """Replace the whole state of ``optimizer`` by that in ``reader``.

    Args:
        optimizer: whose state.
        named_parameters: names, and what the optimizer holds under each.
        reader: the checkpoint.
        read: where a rank holds pieces; None: it keeps every tensor whole.

    The old state is cleared first: a checkpoint without some of it would leave it stale.
    """
    optimizer.state.clear()
    saved: dict[str, list[str]] = {}
    for entry in reader.names():
        if entry.startswith("optim/"):
            owner, _, key = entry.removeprefix("optim/").rpartition("/")
            saved.setdefault(owner, []).append(key)
    for name, parameter in named_parameters:
        if name in saved:
            prefix = f"optim/{name}/"
            state = _read_state(reader, prefix, saved[name], parameter, read or read_whole)
            optimizer.state[parameter] = state


def _read_state(
    reader: ShardReader, prefix: str, keys: list[str], parameter: Any, read: ReadTensor
) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for key in keys:
        if "!" not in key:
            state[key] = read(reader, prefix + key, parameter)
        elif key.endswith(_JSON):
            name = key.removesuffix(_JSON)
            state[name] = _read_encoded(reader, prefix + name, parameter)
    return state


def _read_encoded(reader: ShardReader, name: str, parameter: Any) -> Any:
    text = bytes(read_whole(reader, name + _JSON, parameter).tolist()).decode()
    saved = json.loads(text)
    parts = {
        key: read_whole(reader, f"{name}!{number}", parameter)
        for number, key in enumerate(saved["tensors"])
    }
    return decode(saved["value"], parts)


def read_whole(reader: ShardReader, name: str, parameter: Any) -> Tensor:
    """Read all of a tensor, on the device of ``parameter``."""
    shape, dtype = reader.info(name)
    # Counters such as Adam's `step` stay on the CPU, where torch makes them unless it is fused.
    device = parameter.device if shape else torch.device("cpu")
    like = parameter.detach() if shape == tuple(parameter.shape) else torch.empty(shape)
    tensor = torch.empty_like(like, dtype=dtype, device=device)
    reader.fill(name, tensor, (0,) * tensor.dim())
    return tensor
