"""The data suite passes an honest source and fails each wrong one for its own reason."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from torchweld.components import Component
from torchweld.interfaces import LoaderRequest
from torchweld.testing import DataSourceConformance

BATCH = 4


class Loader:
    """Deals the samples out in turn; a rank that runs short repeats one that counts 0."""

    sharded = True
    owns_batches = True
    on_device = False
    batch_size = BATCH

    def __init__(self, request: LoaderRequest) -> None:
        self.request, self.env = request, request.env
        self.num_samples: int | None = len(request.data)
        self.num_batches: int | None = -(-len(request.data) // (BATCH * self.env.world_size))
        self.epoch = self.start = self.position = 0

    def order(self) -> list[int]:
        samples = list(range(len(self.request.data)))
        if self.request.train:
            random.Random(f"{self.request.seed}/{self.epoch}").shuffle(samples)
        return samples

    def share(self, batch: int) -> list[int]:
        whole = BATCH * self.env.world_size
        return self.order()[batch * whole : (batch + 1) * whole][
            self.env.rank :: self.env.world_size
        ]

    def __iter__(self) -> Iterator[Any]:
        for position in range(self.start, self.num_batches or 0):
            self.position = position
            yield self.make_batch(self.share(position) or [0])

    def make_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        samples = [self.sample(index) for index in indices]
        return torch.stack([s[0] for s in samples]), torch.tensor([s[1] for s in samples])

    def sample(self, index: int) -> Any:
        sample = self.request.data[index]
        for transform in self.request.sample_transforms:
            sample = transform(sample)
        return sample

    def samples(self, batch: Any) -> int:
        return len(self.share(self.position))

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch, self.start = epoch, start_batch

    def state_dict(self) -> Mapping[str, object]:
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        pass

    def close(self) -> None:
        pass


class Source:
    def __init__(self, loader: type[Loader]) -> None:
        self.loader = loader

    def build(self, request: LoaderRequest) -> Any:
        return self.loader(request)


def reading(loader: type[Loader]) -> Component:
    return Component("by_hand", "for these tests", partial(Source, loader))


class TestHonest(DataSourceConformance):
    component = reading(Loader)
    options: ClassVar[Mapping[str, object]] = {}


class DropsTheLast(Loader):
    def order(self) -> list[int]:
        return super().order()[:-1] if self.num_samples == 13 else super().order()


class PadsByRepeating(Loader):
    def share(self, batch: int) -> list[int]:
        return super().share(batch) or [0]


class DealsUnevenly(Loader):
    def __init__(self, request: LoaderRequest) -> None:
        super().__init__(request)
        self.num_batches = len(
            [b for b in range(self.num_batches or 0) if self.share(b) or self.env.rank == 0]
        )


class SaysOneMore(Loader):
    def __init__(self, request: LoaderRequest) -> None:
        super().__init__(request)
        self.num_batches = (self.num_batches or 0) + 1

    def __iter__(self) -> Iterator[Any]:
        return islice(super().__iter__(), (self.num_batches or 0) - 1)


class CountsPadding(Loader):
    def samples(self, batch: Any) -> int:
        return len(batch[1])


class SaysTheLengthOfARank(Loader):
    def __init__(self, request: LoaderRequest) -> None:
        super().__init__(request)
        self.num_samples = len(request.data) // 2 + 1


class SaysItIsWhole(Loader):
    sharded = False


class ForgetsTheEpoch(Loader):
    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.start = start_batch


class ForgetsTheSeed(Loader):
    def __init__(self, request: LoaderRequest) -> None:
        super().__init__(request)
        self.request = LoaderRequest(request.data, request.train, request.env, seed=0)


class ShufflesAnew(Loader):
    def __init__(self, request: LoaderRequest) -> None:
        super().__init__(request)
        self.seed = torch.seed() if request.train else 0

    def order(self) -> list[int]:
        samples = super().order()
        random.Random(self.seed).shuffle(samples)
        return samples


class ShufflesEvaluation(Loader):
    def order(self) -> list[int]:
        samples = super().order()
        random.Random(self.epoch).shuffle(samples)
        return samples


class IsSpentAfterAnEpoch(Loader):
    spent = False

    def __iter__(self) -> Iterator[Any]:
        if not self.spent:
            yield from super().__iter__()
        self.spent = True


class StartsOver(Loader):
    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch = epoch


class SavesItself(Loader):
    def state_dict(self) -> Mapping[str, object]:
        return {"loader": self}


class ReusesItsBuffer(Loader):
    def make_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        inputs, targets = super().make_batch(indices)
        self.buffer = getattr(self, "buffer", torch.zeros(BATCH, dtype=torch.int64))
        self.buffer[: len(targets)] = targets
        return inputs, self.buffer[: len(targets)]


class ClosesOnce(Loader):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise ValueError("closed already")
        self.closed = True


class LeavesThreads(Loader):
    def __iter__(self) -> Iterator[Any]:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return super().__iter__()


class DrawsFromTheUser(Loader):
    def __iter__(self) -> Iterator[Any]:
        torch.randperm(3)
        return super().__iter__()


class IgnoresTransforms(Loader):
    def sample(self, index: int) -> Any:
        return self.request.data[index]


TRAIN = {"train": True}
TWO = {"world_size": 2}
WRONG = [
    (DropsTheLast, "test_every_sample_comes_exactly_once", TWO | TRAIN, "13 samples .* missing"),
    (PadsByRepeating, "test_every_sample_comes_exactly_once", TWO | TRAIN, r"more than once \[0\]"),
    (DealsUnevenly, "test_every_rank_gets_equally_many_batches", TWO | TRAIN, r"get \[1, 0\]"),
    (SaysOneMore, "test_every_rank_gets_equally_many_batches", TWO | TRAIN, "num_batches says"),
    (CountsPadding, "test_real_samples_are_counted", TWO | TRAIN, "padding counts 0"),
    (SaysTheLengthOfARank, "test_real_samples_are_counted", TWO | TRAIN, "num_samples says"),
    (SaysItIsWhole, "test_it_says_that_ranks_see_their_own_part", TWO, "`sharded` must be True"),
    (ForgetsTheEpoch, "test_seed_and_epoch_decide_the_order", TWO, "another epoch must give"),
    (ForgetsTheSeed, "test_seed_and_epoch_decide_the_order", TWO, "another seed must give"),
    (ShufflesAnew, "test_seed_and_epoch_decide_the_order", TWO, "same seed and epoch"),
    (ShufflesEvaluation, "test_evaluation_keeps_its_order", TWO, "same order in every epoch"),
    (IsSpentAfterAnEpoch, "test_an_epoch_can_be_read_again", TWO, "that epoch again"),
    (StartsOver, "test_an_epoch_resumes_at_every_batch", TWO | TRAIN, "resumed at batch 1"),
    (SavesItself, "test_its_state_can_be_saved", TWO, "SavesItself"),
    (ReusesItsBuffer, "test_batches_stay_valid_where_that_is_said", TWO, "owns_batches=False"),
    (ClosesOnce, "test_close_can_be_called_twice", TWO, "closed already"),
    (LeavesThreads, "test_leaving_an_epoch_early_leaves_no_thread_behind", {}, "grew 17 threads"),
    (DrawsFromTheUser, "test_the_users_random_state_is_left_alone", TRAIN, "random state of torch"),
    (IgnoresTransforms, "test_sample_transforms_are_applied", {}, "silently left out"),
]


@pytest.mark.parametrize(
    ("loader", "test", "arguments", "message"), WRONG, ids=[case[0].__name__ for case in WRONG]
)
def test_the_suite_finds(
    loader: type[Loader], test: str, arguments: Mapping[str, object], message: str
) -> None:
    suite = suite_for(loader)

    with pytest.raises(AssertionError, match=message):
        getattr(suite, test)(**arguments)


def test_the_suite_lets_a_source_say_that_it_reuses_its_batches() -> None:
    suite_for(SaysThatItReuses).test_batches_stay_valid_where_that_is_said(world_size=2)


class SaysThatItReuses(ReusesItsBuffer):
    owns_batches = False


class Suite(DataSourceConformance):
    """At the top of the module, as the ranks get the suite itself."""

    options: ClassVar[Mapping[str, object]] = {}

    def __init__(self, component: Component) -> None:
        self.component = component  # type: ignore[misc]  # one class for all of these


def suite_for(loader: type[Loader]) -> DataSourceConformance:
    return Suite(reading(loader))
