"""The conformance suite of data sources: every sample once, resumable at every batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.data import Dataset

from torchweld.components import Component
from torchweld.errors import TorchweldError
from torchweld.testing import data_jobs as jobs
from torchweld.testing.data_jobs import Reading, SourceCase
from torchweld.testing.processes import RanksFailed, run_ranks

SIZES = (1, 7, 8, 13, 16)


class Numbered(Dataset[tuple[torch.Tensor, int]]):
    """``n`` samples; sample i is three times the float i, with target i."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        return torch.full((3,), float(index)), index


class DataSourceConformance:
    """Subclass it with ``component = …`` and pytest holds your data source to the contract.

    Attributes:
        component: the data source's.
        options: its options; batches of 4 samples a process.
        world_sizes: numbers of processes to share the data among.
        draws_from: random states of the user (``python``, ``numpy``, ``torch``) that an epoch may
            change, as iterating over a DataLoader does.
        timeout_seconds: of one job; ranks that hang are ended and named.
    """

    component: ClassVar[Component]
    options: ClassVar[Mapping[str, object]] = {"batch_size": 4}
    world_sizes: ClassVar[Sequence[int]] = (1, 2, 3)
    draws_from: ClassVar[Sequence[str]] = ()
    timeout_seconds: ClassVar[float] = 60.0

    def make_data(self, num_samples: int) -> Any:
        """What a user would pass as ``train=``: samples with the targets 0, 1, … n - 1.

        Called in every rank, in a directory that the ranks share.
        """
        return Numbered(num_samples)

    def identify(self, batch: Any) -> list[int]:
        """The numbers of the samples in a batch, padding included, in its order."""
        return [int(target) for target in batch[1]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test for every world size and number of samples that it asks for."""
        if "world_size" in metafunc.fixturenames:
            metafunc.parametrize("world_size", self.world_sizes)
        if "train" in metafunc.fixturenames:
            metafunc.parametrize("train", [True, False], ids=["training", "evaluation"])

    def read(
        self, job: Any, world_size: int, *args: Any, train: bool = True, **changes: Any
    ) -> list[Any]:
        """Run a job of this suite on the ranks; results by rank."""
        case = SourceCase(self, train=train, **changes)
        return run_ranks(job, world_size, case, *args, timeout_seconds=self.timeout_seconds)

    # ---- which samples -------------------------------------------------------------------------

    def test_every_sample_comes_exactly_once(self, world_size: int, train: bool) -> None:
        for num_samples, by_rank in self._epochs(world_size, train):
            found = sorted(sample for reading in by_rank for sample in reading.samples)
            missing = sorted(set(range(num_samples)) - set(found))
            twice = sorted({sample for sample in found if found.count(sample) > 1})
            assert not missing and not twice, (
                f"{num_samples} samples on {world_size} ranks: every sample must come exactly once "
                f"an epoch; missing {missing}, more than once {twice}"
            )

    def test_every_rank_gets_equally_many_batches(self, world_size: int, train: bool) -> None:
        for num_samples, by_rank in self._epochs(world_size, train):
            counts = [len(reading.batches) for reading in by_rank]
            said = [reading.num_batches for reading in by_rank]
            assert len(set(counts)) == 1, (
                f"{num_samples} samples on {world_size} ranks: the ranks get {counts} batches; "
                "training waits for ever where they differ"
            )
            assert said in ([None] * world_size, counts), (
                f"num_batches says {said}, and {counts} batches come"
            )

    def test_real_samples_are_counted(self, world_size: int, train: bool) -> None:
        for num_samples, by_rank in self._epochs(world_size, train):
            total = sum(sum(reading.counts) for reading in by_rank)
            assert total == num_samples, (
                f"{num_samples} samples on {world_size} ranks: samples(batch) adds up to {total} "
                "(padding counts 0)"
            )
            said = {reading.num_samples for reading in by_rank}
            assert said <= {None, num_samples}, f"num_samples says {said}, there are {num_samples}"

    def test_it_says_that_ranks_see_their_own_part(self, world_size: int) -> None:
        for reading in self.read(jobs.read_epoch, world_size, 8):
            assert reading.sharded or world_size == 1, (
                "`sharded` must be True: every rank sees its own part"
            )

    # ---- in which order ------------------------------------------------------------------------

    def test_seed_and_epoch_decide_the_order(self, world_size: int) -> None:
        first, again, later, other = (
            [r.samples for r in self.read(jobs.read_epoch, world_size, 16, epoch=e, seed=s)]
            for e, s in ((3, 5), (3, 5), (4, 5), (3, 6))
        )

        assert again == first, "the same seed and epoch must give the same order"
        assert later != first, "another epoch must give another order of the training data"
        assert other != first, "another seed must give another order of the training data"

    def test_evaluation_keeps_its_order(self, world_size: int) -> None:
        first, later = (
            [r.samples for r in self.read(jobs.read_epoch, world_size, 16, epoch=e, train=False)]
            for e in (0, 1)
        )

        assert later == first, "evaluation must come in the same order in every epoch"

    def test_an_epoch_can_be_read_again(self, world_size: int) -> None:
        for first, second in self.read(jobs.read_twice, world_size, 13):
            assert second == first, "set_epoch() and iter() once more must give that epoch again"

    # ---- resuming ------------------------------------------------------------------------------

    def test_an_epoch_resumes_at_every_batch(self, world_size: int, train: bool) -> None:
        for rank, (whole, rests) in enumerate(
            self.read(jobs.resume_everywhere, world_size, 13, train=train)
        ):
            for start, rest in rests.items():
                assert rest == whole[start:], (
                    f"rank {rank} of {world_size}, resumed at batch {start}: got {rest}, the "
                    f"uninterrupted epoch goes on with {whole[start:]}"
                )

    def test_its_state_can_be_saved(self, world_size: int) -> None:
        self.read(jobs.save_inside_epoch, world_size, 13)

    # ---- batches and resources -----------------------------------------------------------------

    def test_batches_stay_valid_where_that_is_said(self, world_size: int) -> None:
        for owns, kept, copied in self.read(jobs.keep_batches, world_size, 13):
            assert kept == copied or not owns, (
                "owns_batches=True promises that a batch stays as it is when the next one comes, "
                "but list(loader) differs from reading one by one; say owns_batches=False"
            )

    def test_close_can_be_called_twice(self, world_size: int) -> None:
        self.read(jobs.close_twice, world_size, 13)

    def test_leaving_an_epoch_early_leaves_no_thread_behind(self) -> None:
        ((early, late),) = self.read(jobs.leave_early, 1, 16)
        # A leak grows by one in each of the 17 epochs between; a worker that is just ending by one.
        assert late - early < 8, (
            f"20 epochs that were left after a batch grew {late - early} threads or processes: "
            "stop them when the iterator is closed"
        )

    def test_the_users_random_state_is_left_alone(self, train: bool) -> None:
        (changed,) = self.read(jobs.changes_random_state, 1, 13, train=train)
        unsaid = [kind for kind in changed if kind not in self.draws_from]
        assert not unsaid, (
            f"reading an epoch draws from the user's random state of {', '.join(unsaid)}: use a "
            "generator seeded from request.seed and the epoch, or say so in draws_from"
        )

    def test_sample_transforms_are_applied(self) -> None:
        try:
            (applied,) = self.read(jobs.transforms_samples, 1, 8)
        except RanksFailed as failed:
            if isinstance(failed.failures[0].error, TorchweldError):
                pytest.skip(f"sample transforms are refused: {failed.failures[0].message}")
            raise
        assert applied, "request.sample_transforms were silently left out: apply or refuse them"

    def _epochs(self, world_size: int, train: bool) -> list[tuple[int, list[Reading]]]:
        by_rank = self.read(jobs.read_sizes, world_size, SIZES, train=train)
        return [(n, list(each)) for n, each in zip(SIZES, zip(*by_rank, strict=True), strict=True)]
