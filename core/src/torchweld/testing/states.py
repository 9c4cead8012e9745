"""State of a model as every strategy can show it: pieces of all ranks, put together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld.checkpoint.pieces import Piece, cover_problem
from torchweld.interfaces import Shard

State = Mapping[str, Tensor]
"""Whole tensors by the names of :class:`~torchweld.interfaces.Shard`."""


@dataclass(frozen=True)
class Kept:
    """A shard with memory of its own, as it travels from its rank to the test."""

    name: str
    local: Tensor
    global_shape: tuple[int, ...]
    start: int | tuple[int, ...]


def keep(shards: Iterable[Shard]) -> list[Kept]:
    """Copy the shards of this rank before the next step changes them."""
    return [Kept(s.name, s.local.detach().clone(), tuple(s.global_shape), s.start) for s in shards]


def assemble(by_rank: Sequence[Iterable[Kept]]) -> dict[str, Tensor]:
    """Put the pieces of all ranks together.

    Raises:
        AssertionError: the pieces of a tensor do not cover it exactly once.
    """
    found: dict[str, list[Kept]] = {}
    for pieces in by_rank:
        for piece in pieces:
            found.setdefault(piece.name, []).append(piece)
    return {name: _whole(name, found[name]) for name in sorted(found)}


def weights(state: State) -> dict[str, Tensor]:
    """Parameters and buffers of a state, under the model's own names."""
    prefix = "model/"
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def _whole(name: str, pieces: Sequence[Kept]) -> Tensor:
    as_pieces = [Piece(p.global_shape, p.start, tuple(p.local.shape)) for p in pieces]
    problem = cover_problem(as_pieces)
    assert not problem, (
        f"shards(): over all ranks the pieces of {name!r} must cover it exactly once, but "
        f"{problem}; yield replicated values on one rank only"
    )
    whole = torch.empty(pieces[0].global_shape, dtype=pieces[0].local.dtype)
    for piece in pieces:
        _place(whole, piece)
    return whole


def _place(whole: Tensor, piece: Kept) -> None:
    if isinstance(piece.start, int):
        end = piece.start + piece.local.numel()
        whole.view(-1)[piece.start : end].copy_(piece.local.reshape(-1))
        return
    corner = tuple(
        slice(begin, begin + size)
        for begin, size in zip(piece.start, piece.local.shape, strict=True)
    )
    whole[corner].copy_(piece.local)


def assert_same_gradients(
    found: State, expected: State, tolerance: float, *, what: str, world_size: int
) -> None:
    """Compare gradients, relative to the largest of the expected ones.

    Args:
        found: as a strategy made them.
        expected: as plain PyTorch made them, on the whole batch; zero where there is none.
        tolerance: largest difference, relative.
        what: the behaviour under test, for the message.
        world_size: for the message, which names the usual causes by their factor.
    """
    assert found.keys() == expected.keys(), (
        f"{what}: trained parameters are {sorted(found)}, the model has {sorted(expected)}"
    )
    largest = max(float(t.abs().max()) for t in expected.values())
    errors = {n: float((found[n] - t).abs().max()) / largest for n, t in expected.items()}
    worst = max(errors, key=lambda n: errors[n] if math.isfinite(errors[n]) else math.inf)
    unmoved = [n for n, t in expected.items() if not t.any() and found[n].any()]
    assert not unmoved, f"{what}: {unmoved[0]!r} has no gradient in this step, and it moved"
    assert errors[worst] <= tolerance, (
        f"{what}: gradients differ from plain PyTorch's by {errors[worst]:.1e} of the largest "
        f"(at most {tolerance:.0e}), most in {worst!r}{_cause(found, expected, world_size)}"
    )


def _cause(found: State, expected: State, world_size: int) -> str:
    length, wanted = _norm(found), _norm(expected)
    parts = (float((found[n].double() * t.double()).sum()) for n, t in expected.items())
    along = sum(parts) / wanted**2
    if length < 1e-6 * wanted:
        return "; nothing moved: is `optimizer` the one whose param_groups decide the step?"
    if abs(length - 1.0) < 1e-3 and wanted > 2:
        return "; their norm is 1.0: clipping is off, so write it off explicitly"
    if world_size > 1 and abs(along - world_size) < 1e-3:
        return f"; they are {world_size} times as large: summed over the ranks, not averaged"
    if abs(along - 1) > 1e-3 and abs(length / wanted - abs(along)) < 1e-3:
        return f"; all are {along:.4g} times as large: a loss or gradient is scaled twice, or never"
    return ""


def _norm(state: State) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in state.values()))


def assert_same_state(found: State, expected: State, *, what: str) -> None:
    """Compare two states bitwise, names included."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    assert not missing and not extra, f"{what}: missing {missing[:5]}, not expected {extra[:5]}"
    wrong = [n for n, t in expected.items() if not torch.equal(found[n], t)]
    assert not wrong, f"{what}: {len(wrong)} of {len(expected)} tensors differ: {wrong[:5]}"
