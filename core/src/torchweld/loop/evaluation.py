"""Evaluation: every sample once, weighted by real counts, exact over several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchweld import rng
from torchweld.errors import InvalidArgument, RunError
from torchweld.loop.metric_objects import computed
from torchweld.model.facts import check_counts, named_loss
from torchweld.processes.agree import agree_on

if TYPE_CHECKING:
    from torchweld.interfaces import Loader, Metric
    from torchweld.loop.handle import Handle
    from torchweld.loop.joint import Handles
    from torchweld.processes.ranks import Ranks


_SAMPLES = " samples"  # no name that a metric can have


@dataclass(frozen=True)
class Evaluator:
    """What evaluation needs, bound once.

    Attributes:
        handle: the model.
        is_collective: every rank must evaluate as many batches.
        forward: ``batch -> (outputs, targets)``, the user's ``eval_step`` or the default.
        loss: ``(outputs, targets) -> loss``, or None where only the model knows it.
        metrics: name to callable or metric object.
        transform: moves a batch to the device and applies the input transforms.
        model: whose layers are in evaluation meanwhile, each back in its own mode afterwards.
    """

    handle: Handle | Handles
    is_collective: bool
    ranks: Ranks
    forward: Callable[[Any], tuple[Any, Any]]
    loss: Callable[[Any, Any], Any] | None
    metrics: Mapping[str, Metric]
    transform: Callable[[Any], Any] | None
    model: nn.Module

    def evaluate(self, loader: Loader, *, limit: int | None = None) -> dict[str, float]:
        """Return ``loss`` and every metric over ``loader``, equal on all ranks.

        Every rank must call it. The random state is left as it was, so that evaluating does not
        change what is trained afterwards.

        Raises:
            RunError: the loader had nothing to read.
        """
        with rng.preserved(), modes_kept(self.model), evaluating(self.handle):
            loader.set_epoch(0)
            sums, counts = self._sums(islice(self._in_step(loader), limit))
            result = self._reduce(sums, counts)
            result.update(computed(self.metrics, self.ranks))
        return result

    def predict(self, loader: Loader) -> list[Any]:
        """Return this rank's outputs, batch by batch, in order; every rank must call it."""
        outputs: list[Any] = []
        with rng.preserved(), modes_kept(self.model), evaluating(self.handle):
            loader.set_epoch(0)
            for batch, samples in self._in_step(loader):
                result = self.forward(self._prepared_batch(batch))[0]
                if samples > 0:
                    outputs.append(result)
        return outputs

    def _in_step(self, loader: Loader) -> Iterator[tuple[Any, int]]:
        """The batches of ``loader`` and how many samples of each count.

        Where evaluation is a collective, a rank with fewer batches repeats its last one, which
        counts for nothing: otherwise the others would wait for it for ever.
        """
        longest = self._longest(loader) if self.is_collective else 0
        batch = None
        for batch in loader:
            longest -= 1
            yield batch, loader.samples(batch)
        for _ in range(longest):
            yield batch, 0

    def _longest(self, loader: Loader) -> int:
        """The most batches that a rank has."""
        counts = self.ranks.exchange("evaluation", str(loader.num_batches))
        if "None" in counts:
            raise RunError(
                "evaluation under this strategy needs every process to read as many batches, and "
                "the data has no length: give it one, or evaluate on a Dataset"
            )
        lengths = [int(count) for count in counts]
        if min(lengths) == 0 and max(lengths):
            raise RunError(
                f"evaluation under this strategy needs every process, and rank {lengths.index(0)} "
                f"has no batch (the processes have {', '.join(counts)}): give every one some data"
            )
        return max(lengths)

    def _prepared_batch(self, batch: Any) -> Any:
        return batch if self.transform is None else self.transform(batch)

    def _sums(self, batches: Iterator[tuple[Any, int]]) -> tuple[dict[str, Any], dict[str, Any]]:
        sums: dict[str, Any] = {}
        counts: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            if hasattr(metric, "reset"):
                if isinstance(metric, nn.Module):
                    metric.to(self.ranks.env.device)
                metric.reset()
            else:
                sums[name], counts[name] = 0.0, 0.0
        sums["loss"], counts["loss"] = 0.0, 0
        sums[_SAMPLES], counts[_SAMPLES] = 0, 0
        for batch, samples in batches:
            outputs, targets = self.forward(self._prepared_batch(batch))
            counts[_SAMPLES] += samples
            if samples == 0:  # only there to keep the ranks in step
                continue
            loss = self._loss(outputs, targets)
            if loss is not None:
                sums["loss"] = sums["loss"] + loss.double() * samples
                counts["loss"] += samples
            self._count(outputs, targets, sums, counts)
        return sums, counts

    def _loss(self, outputs: Any, targets: Any) -> torch.Tensor | None:
        if self.loss is not None:
            return named_loss(self.loss(outputs, targets))  # type: ignore[no-any-return]  # the user's
        found = (
            outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        )
        return found if isinstance(found, torch.Tensor) and found.dim() == 0 else None

    def _count(
        self, outputs: Any, targets: Any, sums: dict[str, Any], counts: dict[str, Any]
    ) -> None:
        for name, metric in self.metrics.items():
            if hasattr(metric, "update"):
                metric.update(outputs, targets)
                continue
            result = metric(outputs, targets)
            check_counts(name, result)
            sums[name] = sums[name] + result[0]
            counts[name] = counts[name] + result[1]

    def _reduce(self, sums: dict[str, Any], counts: dict[str, Any]) -> dict[str, float]:
        names = sorted(sums)
        device = self.ranks.env.device
        values = [
            float(v) if not isinstance(v, torch.Tensor) else v
            for n in names
            for v in (sums[n], counts[n])
        ]
        table = torch.stack(
            [torch.as_tensor(v, dtype=torch.float64, device=device) for v in values]
        )
        totals = self.ranks.sum(table).tolist()
        pairs = {n: (totals[2 * i], totals[2 * i + 1]) for i, n in enumerate(names)}
        if pairs.pop(_SAMPLES)[1] == 0:
            raise RunError("evaluation read no sample: the data is empty, or was read before")
        return {n: total / count for n, (total, count) in pairs.items() if count}


def evaluate_data(
    evaluator: Evaluator, make_loader: Callable[[Any], Loader], data: Any
) -> dict[str, float]:
    """Return what ``evaluator`` measures on ``data``; every rank must call it.

    Args:
        data: one set, or a mapping of several, whose values are named as those of ``val=``:
            ``loss/<set>``.

    Raises:
        InvalidArgument: the mapping is empty.
        RanksDisagree: the ranks have other sets, or in another order.
    """
    if not isinstance(data, Mapping):
        with closing(make_loader(data)) as loader:
            return evaluator.evaluate(loader)
    if not data:
        raise InvalidArgument("data={} has no set to evaluate: give one, or a mapping of several")
    # The sums are added up set by set, so all ranks must have them in one order.
    agree_on(evaluator.ranks, "choice of sets", {"data": str([str(name) for name in data])})
    found: dict[str, float] = {}
    for name, each in data.items():
        with closing(make_loader(each)) as loader:
            result = evaluator.evaluate(loader)
        found.update({f"{k}/{name}" if name else k: v for k, v in result.items()})
    return found


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Leave every layer in the mode in which it was found, a frozen BatchNorm in evaluation."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


class evaluating:
    """Switch to evaluation without gradients, and back to training when left.

    ``no_grad``, not ``inference_mode``: a first forward in the latter breaks FSDP2's training.
    """

    def __init__(self, handle: Handle | Handles) -> None:
        self._handle = handle
        self._no_grad = torch.no_grad()

    def __enter__(self) -> None:
        self._handle.mode(False)
        self._no_grad.__enter__()

    def __exit__(self, *error: object) -> None:
        self._no_grad.__exit__(*error)
        self._handle.mode(True)


def bind_forward(
    prepared_forward: Callable[..., Any], *, takes_targets: bool = False
) -> Callable[[Any], tuple[Any, Any]]:
    """The default step of evaluation: pairs through ``forward(inputs)``, mappings by keyword.

    Args:
        takes_targets: the model returns its loss, so it is called with whole pairs.
    """

    def forward(batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            return prepared_forward(**batch), batch
        if isinstance(batch, (tuple, list)):
            check_pair(batch)
            if takes_targets:
                return prepared_forward(*batch), batch[-1]
            return prepared_forward(batch[0]), batch[1] if len(batch) == 2 else None
        return prepared_forward(batch), None

    return forward


def check_pair(batch: Sequence[Any]) -> None:
    """Refuse a sequence that evaluation cannot read: it has inputs, and targets perhaps.

    Raises:
        InvalidArgument: says how many items there are.
    """
    if len(batch) not in {1, 2}:
        raise InvalidArgument(
            f"a batch is a {type(batch).__name__} of {len(batch)} items: evaluation knows pairs "
            "(inputs, targets) and mappings; give eval_step=(run, batch) -> (outputs, targets)"
        )
