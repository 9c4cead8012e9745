"""Several models as one: what borders, checkpoints and evaluation see of them.

Names are the model's name, a dot, and the name inside it, as of a module that has the models as
its children.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from torchweld.errors import CheckpointError, InvalidArgument
from torchweld.interfaces import Prepared, Shard, ShardReader

if TYPE_CHECKING:
    from torch import Tensor

    from torchweld.loop.wiring import Member


def join(members: Mapping[str, Member]) -> Prepared:
    """Return all ``members`` as one; where one alone is trained, its backward and its step."""
    parts = {name: member.prepared for name, member in members.items()}
    trained = [part for part in parts.values() if part.optimizer is not None]
    only = trained[0] if len(trained) == 1 else None
    refuse = _refusal(members)
    return Prepared(
        forward=refuse,
        evaluate=refuse,
        evaluate_is_collective=any(part.evaluate_is_collective for part in parts.values()),
        mode=lambda train: _set_modes(members, train),
        optimizer=Optimizers(trained),  # type: ignore[arg-type]  # what is used of an optimizer
        backward=only.backward if only else refuse,
        step=only.step if only else refuse,
        step_closure=None,
        window=_windows(trained),
        grad_norm=lambda: _total_norm(trained),
        frozen=lambda: _all_frozen(parts.values()),
        named_parameters=lambda: _named_parameters(parts),
        shards=lambda: _shards(parts),
        restore=lambda reader: _restore(parts, reader),
        bytes_per_rank=lambda: _bytes(parts.values()),
    )


def _refusal(members: Mapping[str, Member]) -> Callable[..., NoReturn]:
    names = ", ".join(members)

    def refuse(*_args: Any, **_options: Any) -> NoReturn:
        raise InvalidArgument(
            f"this run has several models ({names}): say which, run.models[{next(iter(members))!r}]"
            "; to evaluate them give eval_step=(run, batch) -> (outputs, targets)"
        )

    return refuse


def _set_modes(members: Mapping[str, Member], train: bool) -> None:
    for member in members.values():
        member.handle.mode(train and member.trains)


def _windows(trained: Sequence[Prepared]) -> Callable[[bool, int], None] | None:
    told = [part.window for part in trained if part.window is not None]
    if not told:
        return None

    def window(last: bool, size: int) -> None:
        for tell in told:
            tell(last, size)

    return window


def _total_norm(trained: Sequence[Prepared]) -> Tensor | None:
    norms = [norm for part in trained if (norm := part.grad_norm()) is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) == len(trained) else None


@contextmanager
def _all_frozen(parts: Iterable[Prepared]) -> Iterator[None]:
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.frozen())
        yield


def _named_parameters(parts: Mapping[str, Prepared]) -> Iterator[tuple[str, Any]]:
    for name, part in parts.items():
        yield from ((f"{name}.{inner}", value) for inner, value in part.named_parameters())


def _bytes(parts: Iterable[Prepared]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for what, size in part.bytes_per_rank().items():
            total[what] = total.get(what, 0) + size
    return total


# ---- state -----------------------------------------------------------------------------------


def _shards(parts: Mapping[str, Prepared]) -> Iterator[Shard]:
    for name, part in parts.items():
        for shard in part.shards():
            kind, _, inner = shard.name.partition("/")
            yield replace(shard, name=f"{kind}/{name}.{inner}")


def _restore(parts: Mapping[str, Prepared], reader: ShardReader) -> None:
    for name, part in parts.items():
        part.restore(_OfOne(reader, name))


@dataclass(frozen=True)
class _OfOne:
    """What a checkpoint has of one of its models."""

    reader: ShardReader
    model: str

    def names(self) -> Iterator[str]:
        """Names of the model's tensors, as it alone would have written them."""
        for name in self.reader.names():
            kind, _, inner = name.partition("/")
            if inner.startswith(f"{self.model}."):
                yield f"{kind}/{inner.removeprefix(f'{self.model}.')}"

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Global shape and dtype."""
        return self.reader.info(self._outer(name))

    def fill(self, name: str, local: Tensor, start: int | Sequence[int]) -> None:
        """Copy a piece into ``local``."""
        self.reader.fill(self._outer(name), local, start)

    def _outer(self, name: str) -> str:
        kind, _, inner = name.partition("/")
        return f"{kind}/{self.model}.{inner}"


class Optimizers:
    """The optimizers of several models, for reading and writing their parameter groups."""

    def __init__(self, trained: Sequence[Prepared]) -> None:
        self._optimizers = [part.optimizer for part in trained if part.optimizer is not None]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them, the very ones that decide their next steps."""
        return [group for one in self._optimizers for group in one.param_groups]

    def step(self) -> NoReturn:
        """Each is stepped on its own."""
        raise NotImplementedError


class Schedulers:
    """The schedulers of several models, for their state.

    Each model steps its own; ``step`` is for a run in which one model alone is trained.
    """

    def __init__(self, schedulers: Mapping[str, Any]) -> None:
        self._schedulers = schedulers

    def step(self) -> None:
        """Step all."""
        for scheduler in self._schedulers.values():
            scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Class and state by model."""
        return {
            name: {"class": type(scheduler).__name__, "state": scheduler.state_dict()}
            for name, scheduler in self._schedulers.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of the same schedulers.

        Raises:
            CheckpointError: others were saved.
        """
        theirs = {name: saved["class"] for name, saved in state.items()}
        mine = {name: type(scheduler).__name__ for name, scheduler in self._schedulers.items()}
        if theirs != mine:
            raise CheckpointError(
                f"the checkpoint was made with lr_scheduler {theirs}, and this run has {mine}: "
                "resume with the same, or start from its weights alone with init_weights="
            )
        for name, saved in state.items():
            self._schedulers[name].load_state_dict(saved["state"])


class Handles:
    """Stands where a single model would be: switches all, and refuses to be one.

    Attributes:
        mode: switches all between training and evaluation.
        optimizer: of all of them.
        bytes_per_rank: of all of them.
    """

    def __init__(self, prepared: Prepared, members: Mapping[str, Member]) -> None:
        self.mode, self.optimizer = prepared.mode, prepared.optimizer
        self.bytes_per_rank = prepared.bytes_per_rank
        self._members = members
        refuse = _refusal(members)
        self.backward = self.step = self.alone = self.named_parameters = refuse
        self.mark_forward_method = refuse

    @property
    def used(self) -> bool:
        """Whether any of the models was called since somebody set this to False."""
        return any(member.handle.used for member in self._members.values())

    @used.setter
    def used(self, used: bool) -> None:
        for member in self._members.values():
            member.handle.used = used

    def __call__(self, *_args: Any, **_options: Any) -> NoReturn:
        """Refuse: there are several.

        Raises:
            InvalidArgument: names them.
        """
        _refusal(self._members)()
