"""Optimizer state by parameter name, as pieces: tensors as they are, the rest as JSON bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchweld.checkpoint import decode, encode
from torchweld.interfaces import Shard, ShardReader

if TYPE_CHECKING:
    from torch.optim import Optimizer

_JSON = "!json"


def optimizer_shards(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> Iterator[Shard]:
    """Yield the state of every parameter as ``optim/<name>/<key>``.

    A value that is no tensor (LBFGS keeps lists and counts) becomes ``<key>!json``, its text as
    bytes, and ``<key>!<number>``, the tensors in it.
    """
    for name, parameter in named_parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            yield from _value_shards(f"optim/{name}/{key}", value)


def _value_shards(name: str, value: Any) -> Iterator[Shard]:
    if isinstance(value, Tensor):
        yield _whole(name, value)
        return
    encoded, parts = encode(value, "optimizer state")
    for number, tensor in enumerate(parts.values()):
        yield _whole(f"{name}!{number}", tensor)
    text = json.dumps({"value": encoded, "tensors": list(parts)})
    yield _whole(name + _JSON, torch.tensor(list(text.encode()), dtype=torch.uint8))


def _whole(name: str, tensor: Tensor) -> Shard:
    return Shard(name, tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim())


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors that the optimizer keeps for its parameters."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def restore_optimizer(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    reader: ShardReader,
) -> None:
    """Replace the whole state of ``optimizer`` by that in ``reader``.

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
            state = _read_state(reader, f"optim/{name}/", saved[name], parameter)
            optimizer.state[parameter] = state


def _read_state(
    reader: ShardReader, prefix: str, keys: list[str], parameter: nn.Parameter
) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for key in keys:
        if "!" not in key:
            state[key] = _read(reader, prefix + key, parameter)
        elif key.endswith(_JSON):
            name = key.removesuffix(_JSON)
            state[name] = _read_encoded(reader, prefix + name, parameter)
    return state


def _read_encoded(reader: ShardReader, name: str, parameter: nn.Parameter) -> Any:
    text = bytes(_read(reader, name + _JSON, parameter).tolist()).decode()
    saved = json.loads(text)
    parts = {
        key: _read(reader, f"{name}!{number}", parameter)
        for number, key in enumerate(saved["tensors"])
    }
    return decode(saved["value"], parts)


def _read(reader: ShardReader, name: str, parameter: nn.Parameter) -> Tensor:
    shape, dtype = reader.info(name)
    # Counters such as Adam's `step` stay on the CPU, where torch makes them unless it is fused.
    device = parameter.device if shape else torch.device("cpu")
    like = parameter.detach() if shape == tuple(parameter.shape) else torch.empty(shape)
    tensor = torch.empty_like(like, dtype=dtype, device=device)
    reader.fill(name, tensor, (0,) * tensor.dim())
    return tensor
