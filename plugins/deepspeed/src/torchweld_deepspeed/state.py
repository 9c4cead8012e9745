"""Each rank's pieces of a model under ZeRO for a checkpoint, and back; nothing is gathered.

ZeRO lays the parameters of a group end to end and cuts the row (stages 1 and 2), or cuts every
parameter and lays its own pieces end to end (stage 3). Either way a rank holds of a parameter one
range of its flattened elements, at some place of one flat tensor, and the optimizer's state has
the same places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchweld.errors import CheckpointError
from torchweld.interfaces import Shard, ShardReader
from torchweld.model.names import canonical, persistent_buffers
from torchweld.strategies.optimizer_state import optimizer_shards, whole

if TYPE_CHECKING:
    from torchweld.interfaces import Env
    from torchweld_deepspeed.engine import Engine

_COUNTERS = frozenset({"step", "mu_product", "mu", "eta"})
"""Keys of optimizer state that are one number for a parameter, whatever its shape."""


@dataclass(frozen=True)
class Span:
    """The elements of one parameter that this rank steps.

    Attributes:
        name: canonical.
        shape: of the whole parameter.
        start: position of the first in the flattened parameter.
        count: how many; 0 where other ranks have them all.
        flat: the fp32 tensor in which they lie; the key of the optimizer's state.
        offset: position of the first in ``flat``.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """These elements of ``flat`` or of a state with its places."""
        return flat.detach().narrow(0, self.offset, self.count)


def spans_of(made: Engine, names: Mapping[int, str], rank: int) -> list[Span]:
    """Return a span for every trained parameter, in the order of the groups.

    Args:
        made: with an optimizer.
        names: canonical, by the identity of the parameter.
        rank: this one.
    """
    find = _spans_of_pieces if made.stage == 3 else _spans_of_rows
    return list(find(made.zero, names, rank))


def _spans_of_rows(zero: Any, names: Mapping[int, str], rank: int) -> Iterator[Span]:
    for group, parameters in enumerate(zero.round_robin_bit16_groups):
        size, flat = zero.partition_size[group], zero.single_partition_of_fp32_groups[group]
        begin = size * rank
        for parameter, place in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
            first = max(place, begin)
            count = max(min(place + parameter.numel(), begin + size) - first, 0)
            start, offset = (first - place, first - begin) if count else (0, 0)
            yield Span(names[id(parameter)], tuple(parameter.shape), start, count, flat, offset)


def _spans_of_pieces(zero: Any, names: Mapping[int, str], rank: int) -> Iterator[Span]:
    for parameters in zero.fp16_groups:
        for parameter in parameters:
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            start, count = piece_of(parameter, rank)
            flat = zero.fp32_partitioned_groups_flat[group]
            yield Span(names[id(parameter)], tuple(parameter.ds_shape), start, count, flat, offset)


def piece_of(parameter: Any, rank: int) -> tuple[int, int]:
    """First element and number of elements of a parameter that ``rank`` holds at stage 3."""
    size = parameter.ds_tensor.ds_numel
    start = min(size * rank, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)


class ZeroState:
    """Yields and fills the pieces of this rank.

    Args:
        made: with an optimizer.
        model: inside of it.
        env: this rank among the others.
    """

    def __init__(self, made: Engine, model: nn.Module, env: Env) -> None:
        self._made, self._model, self._rank = made, model, env.rank
        self._names = {id(p): canonical(n) for n, p in model.named_parameters()}
        spans = spans_of(made, self._names, env.rank) if made.zero is not None else []
        self._spans = {span.name: span for span in spans}

    @property
    def spans(self) -> list[Span]:
        """Of every trained parameter."""
        return list(self._spans.values())

    # ---- out -------------------------------------------------------------------------------------

    def shards(self) -> Iterator[Shard]:
        """Yield what this rank has to write.

        Raises:
            CheckpointError: it is on a drive.
        """
        self._check_here()
        for span in self._spans.values():
            yield from _span_shard(f"model/{span.name}", span.of(span.flat), span)
        for parameter in self._model.parameters():
            if self._names[id(parameter)] not in self._spans:
                yield from self._working_copy(parameter)
        yield from self._buffers()
        if self._made.optimizer is not None:
            yield from self._optimizer_shards()

    def working_copies(self) -> Iterator[Shard]:
        """Yield the weights that forward uses, which are others than those that are stepped.

        Raises:
            CheckpointError: they are on a drive.
        """
        self._check_here()
        for parameter in self._model.parameters():
            yield from self._working_copy(parameter)
        yield from self._buffers()

    def _check_here(self) -> None:
        if self._made.swaps:
            raise CheckpointError(
                "what is offloaded to 'nvme' is on the drive between two steps, and torchweld "
                "reads no pieces there: offload to 'cpu', or train with enable_checkpointing=False"
            )

    def _buffers(self) -> Iterator[Shard]:
        if self._rank == 0:
            for name, buffer in persistent_buffers(self._model):
                yield from whole(f"model/{name}", buffer, None)

    def _working_copy(self, parameter: Any) -> Iterator[Shard]:
        name = f"model/{self._names[id(parameter)]}"
        if self._made.stage < 3:
            yield from whole(name, parameter, None) if self._rank == 0 else ()
            return
        start, count = piece_of(parameter, self._rank)
        if count:
            local = parameter.ds_tensor.detach().narrow(0, 0, count)
            yield Shard(name, local, tuple(parameter.ds_shape), start)

    def _optimizer_shards(self) -> Iterator[Shard]:
        named = [(span.name, span.flat) for span in self._spans.values()]
        optimizer: Any = self._made.optimizer
        for shard in optimizer_shards(optimizer, named, self._state_shards):
            # What is no tensor is alike on all ranks: that of the first element writes it.
            owner, _, key = shard.name.removeprefix("optim/").rpartition("/")
            if "!" not in key or _writes_counters(self._spans[owner]):
                yield shard

    def _state_shards(self, name: str, value: Tensor, flat: Any) -> Iterator[Shard]:
        span = self._spans[name.removeprefix("optim/").rpartition("/")[0]]
        if value.shape == flat.shape:
            yield from _span_shard(name, span.of(value), span)
        elif _writes_counters(span):
            yield from whole(name, value, None)

    # ---- back ------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self, reader: ShardReader) -> None:
        """Fill pieces, working copies, buffers and optimizer state; the state before is cleared.

        Raises:
            CheckpointError: parameters of one group have different step counters, or what is to
                be filled is on a drive.
        """
        self._check_here()
        for span in self._spans.values():
            _fill(reader, f"model/{span.name}", span.of(span.flat), span.start)
        for parameter in self._model.parameters():
            self._fill_working_copy(reader, parameter)
        for name, buffer in persistent_buffers(self._model):
            reader.fill(f"model/{name}", buffer, (0,) * buffer.dim())
        if self._made.optimizer is not None:
            self._restore_optimizer(reader)

    def _fill_working_copy(self, reader: ShardReader, parameter: Any) -> None:
        """Write what forward uses: it is another tensor than the one that is stepped."""
        name = f"model/{self._names[id(parameter)]}"
        if self._made.stage < 3:
            _fill(reader, name, parameter.detach(), 0)
            return
        start, count = piece_of(parameter, self._rank)
        _fill(reader, name, parameter.ds_tensor.detach().narrow(0, 0, count), start)
        if parameter.ds_status.name == "AVAILABLE":  # small ones stay whole between two steps
            _fill(reader, name, parameter.detach(), 0)

    def _restore_optimizer(self, reader: ShardReader) -> None:
        optimizer: Any = self._made.optimizer
        optimizer.state.clear()
        saved = _saved_keys(reader)
        by_flat: dict[int, list[Span]] = {}
        for span in self._spans.values():
            by_flat.setdefault(id(span.flat), []).append(span)
        for spans in by_flat.values():
            state = _read_group(reader, spans, saved)
            if state:
                optimizer.state[spans[0].flat] = state
        if self._made.stage < 3:
            # Its accessors look at views of the state that was there before.
            zero: Any = self._made.zero
            zero._hp_optimizer_states_linked = False


def _writes_counters(span: Span) -> bool:
    return span.start == 0 and span.count > 0


def _span_shard(name: str, local: Tensor, span: Span) -> Iterator[Shard]:
    if span.count:
        yield Shard(name, local, span.shape, span.start)


def _fill(reader: ShardReader, name: str, local: Tensor, start: int) -> None:
    """Fill ``local``, of any shape and dtype, with the elements from ``start`` on."""
    if not local.numel():
        return
    dtype = reader.info(name)[1]
    flat = local.reshape(-1) if local.is_contiguous() else None
    if flat is not None and dtype == local.dtype:
        reader.fill(name, flat, start)
        return
    # Pieces are fp32 where the model computes in bf16 or fp16.
    values = torch.empty(local.numel(), dtype=dtype)
    reader.fill(name, values, start)
    local.copy_(values.view(local.shape))


def _saved_keys(reader: ShardReader) -> dict[str, list[str]]:
    """Parameter name to the keys of its optimizer state in the checkpoint."""
    saved: dict[str, list[str]] = {}
    for entry in reader.names():
        if entry.startswith("optim/"):
            owner, _, key = entry.removeprefix("optim/").rpartition("/")
            saved.setdefault(owner, []).append(key)
    return saved


def _read_group(
    reader: ShardReader, spans: list[Span], saved: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Read the state that the parameters of one flat tensor share."""
    with_state = [span for span in spans if span.name in saved]
    if not with_state:
        return {}
    _check_all(with_state, spans)
    state: dict[str, Any] = {}
    for key in saved[with_state[0].name]:
        if _is_counter(reader, key, spans[0]):
            state[key] = _read_counter(reader, key, spans)
        else:
            state[key] = _read_elements(reader, key, spans)
    return state


def _check_all(with_state: list[Span], spans: list[Span]) -> None:
    without = [span.name for span in spans if span not in with_state]
    if without:
        raise CheckpointError(
            f"the checkpoint has optimizer state of {with_state[0].name!r} and none of "
            f"{without[0]!r}, which was not trained so far, and ZeRO keeps one step counter for "
            "both: resume with strategy='ddp' or 'fsdp', or start from its weights alone with "
            "init_weights="
        )


def _is_counter(reader: ShardReader, key: str, span: Span) -> bool:
    return key in _COUNTERS or reader.info(f"optim/{span.name}/{key}")[0] != span.shape


def _read_counter(reader: ShardReader, key: str, spans: list[Span]) -> Tensor:
    """One number for all parameters of a group, on the CPU, where torch makes it.

    Raises:
        CheckpointError: they differ.
    """
    found: dict[float, str] = {}
    for span in spans:
        name = f"optim/{span.name}/{key}"
        shape, dtype = reader.info(name)
        value = torch.empty(shape, dtype=dtype)
        reader.fill(name, value, (0,) * len(shape))
        found.setdefault(float(value), span.name)
    if len(found) > 1:
        (first, one), (second, other), *_ = found.items()
        raise CheckpointError(
            f"the optimizer's {key!r} is {first:g} for {one!r} and {second:g} for {other!r}, and "
            "ZeRO keeps one for both: resume with strategy='ddp' or 'fsdp', or start from the "
            "weights alone with init_weights="
        )
    return value


def _read_elements(reader: ShardReader, key: str, spans: list[Span]) -> Tensor:
    """A flat tensor of state; zero where only padding lies."""
    # In the dtype of the pieces: another strategy saves what it keeps in bf16 as such.
    state = torch.zeros_like(spans[0].flat.detach())
    for span in spans:
        _fill(reader, f"optim/{span.name}/{key}", span.of(state), span.start)
    return state


def named_parameters(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """Canonical names and parameters; at stage 3 they are empty between two steps."""
    return ((canonical(name), parameter) for name, parameter in model.named_parameters())
