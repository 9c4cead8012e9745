"""Every sample once and counted exactly, on one process and on two; batches of any form."""

from __future__ import annotations

import dataclasses
import os
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from tests.core.trainings import (
    BATCH,
    Stream,
    arguments,
    assert_same,
    fit,
    make_data,
    make_loader,
    make_model,
    make_trainer,
    of_dataset,
    train_by_hand,
    weights,
)
from torchweld import Component
from torchweld.data.loaders import TorchLoader
from torchweld.data.torch_source import TorchSource
from torchweld.errors import InvalidArgument, RunError
from torchweld.interfaces import Env, Loader, LoaderRequest
from torchweld.nesting import move
from torchweld.testing import run_ranks

OPTIONS: dict[str, Any] = {
    "batch_size": None,
    "num_workers": 0,
    "shuffle": None,
    "drop_last": False,
    "pin_memory": False,
    "shard": False,
    "sharded": False,
}

# ---- exact counts over two processes -------------------------------------------------------------


def correct(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    return (outputs.argmax(1) == targets).sum(), len(targets)


class Case(NamedTuple):
    num_samples: int
    accumulate: int = 1
    drop_last: bool = False


CASES = {
    "13 samples": Case(13),
    "a process without samples at the end": Case(9),
    "accumulating, short last window": Case(53, accumulate=4),
    "accumulating, uneven last batch": Case(29, accumulate=4),
    "dropping the last": Case(13, drop_last=True),
}


def train_case(case: Case, world_size: int) -> tuple[dict[str, Tensor], dict[str, float], int]:
    model = make_model()
    data = of_dataset(8 // world_size, drop_last=case.drop_last)
    settings = {
        "strategy": "ddp" if world_size > 1 else "single",
        "data": data,
        "seed": 3,
        "max_epochs": 2,
        "accumulate_grad_batches": case.accumulate,
    }
    metrics = {"accuracy": correct}
    train, val = make_data(case.num_samples), make_data(13)
    result = fit(model, train, val, settings=settings, metrics=metrics)
    return weights(model), dict(result.metrics), result.progress.samples


def train_all(world_size: int) -> dict[str, Any]:
    return {name: train_case(case, world_size) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def on_two() -> list[dict[str, Any]]:
    return run_ranks(train_all, 2, 2)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_like_one_with_the_same_global_batch(
    name: str, on_two: list[dict[str, Any]]
) -> None:
    expected, _, _ = train_case(CASES[name], 1)

    for rank in range(2):
        # Sums of other parts of the batch round differently.
        torch.testing.assert_close(on_two[rank][name][0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_counts_losses_and_metrics_are_those_of_one_process(
    name: str, on_two: list[dict[str, Any]]
) -> None:
    case = CASES[name]
    _, expected, samples = train_case(case, 1)

    for rank in range(2):
        _, metrics, count = on_two[rank][name]
        assert count == samples == 2 * (8 if case.drop_last else case.num_samples)
        assert metrics["val_accuracy"] == expected["val_accuracy"]
        assert metrics["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
        assert metrics["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)


def test_the_loss_of_an_epoch_is_the_mean_over_its_samples() -> None:
    model = make_model()
    frozen = arguments(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))

    result = make_trainer(data=of_dataset()).fit(model, make_data(13), **frozen)

    inputs, targets = make_data(13).tensors
    expected = F.cross_entropy(model(inputs), targets).item()
    assert result.metrics["train_loss"] == pytest.approx(expected, rel=1e-6)
    assert result.progress.samples == 13


class TimeFirst(nn.Module):
    """Takes inputs of shape ``(time, batch, 5)``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs.mean(0))
        return outputs


def time_first(samples: list[Any]) -> tuple[Tensor, Tensor]:
    inputs, targets = torch.utils.data.default_collate(samples)
    return torch.stack([inputs] * 7), targets


def train_time_first(world_size: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    model = TimeFirst()
    train = DataLoader(make_data(13), 8 // world_size, collate_fn=time_first)
    settings = {"strategy": "ddp" if world_size > 1 else "single", "max_epochs": 2}
    result = fit(model, train, train, settings=settings)
    return weights(model.net), dict(result.metrics)


def test_samples_are_not_counted_by_the_shape_of_a_batch() -> None:
    pairs = [[b] for b in DataLoader(make_data(13), 8)] * 2
    expected = train_by_hand(make_model(), pairs)
    inputs, targets = make_data(13).tensors
    loss = F.cross_entropy(expected(inputs), targets).item()

    for trained, metrics in [train_time_first(1), *run_ranks(train_time_first, 2, 2)]:
        torch.testing.assert_close(trained, weights(expected), rtol=1e-6, atol=1e-6)
        assert metrics["val_loss"] == pytest.approx(loss, rel=1e-6)


# ---- loaders, one by one -------------------------------------------------------------------------


def loader_for(data: Any, rank: int = 0, world_size: int = 1, *, train: bool = True,
               transforms: Any = (), **options: Any) -> Loader:  # fmt: skip
    source = TorchSource(**{**OPTIONS, **options})
    env = Env(rank, world_size, rank, torch.device("cpu"))
    return source.build(LoaderRequest(data, train, env, seed=0, sample_transforms=transforms))


class Numbers(Dataset[int]):
    """The numbers below ``size``."""

    def __init__(self, size: int = 13) -> None:
        self.size = size
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class NumberStream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(13))


def read(loader: Loader) -> list[int]:
    """The real samples of one epoch."""
    loader.set_epoch(0)
    found: list[int] = []
    for batch in loader:
        found += batch.flatten().tolist()[: loader.samples(batch)]
    return found


SHARED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "Dataset": (Numbers, {"batch_size": 4}),
    "Dataset in order": (Numbers, {"batch_size": 4, "shuffle": False}),
    "DataLoader": (lambda: DataLoader(Numbers(), 4), {}),
    "shuffling DataLoader": (lambda: DataLoader(Numbers(), 4, shuffle=True), {}),
    "sampler": (
        lambda: DataLoader(Numbers(), 4, sampler=SubsetRandomSampler(range(13))),
        {"shard": True},
    ),
    "IterableDataset": (NumberStream, {"batch_size": 4, "shard": True}),
    "DataLoader of a stream": (lambda: DataLoader(NumberStream(), 4), {"shard": True}),
    "batches": (lambda: iter([torch.tensor([i]) for i in range(13)]), {"shard": True}),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_every_sample_comes_once_over_two_processes(name: str, train: bool) -> None:
    make, options = SHARED[name]
    parts = [read(loader_for(make(), rank, 2, train=train, **options)) for rank in range(2)]

    assert sorted(parts[0] + parts[1]) == list(range(13))


UNSHARDED: dict[str, Callable[[], Any]] = {
    "SubsetRandomSampler": SHARED["sampler"][0],
    "NumberStream": NumberStream,
    "list_iterator": lambda: iter([torch.ones(4)]),
    "own BatchSampler": lambda: DataLoader(
        Numbers(), batch_sampler=BatchSampler(RandomSampler(Numbers()), 4, drop_last=False)
    ),
}


@pytest.mark.parametrize("name", UNSHARDED)
def test_data_that_core_cannot_share_out_is_refused_on_two_processes(name: str) -> None:
    with pytest.raises(InvalidArgument, match="sharded=True"):
        loader_for(UNSHARDED[name](), 0, 2, batch_size=4)


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "make",
    [lambda: Numbers(7), lambda: DataLoader(Numbers(7), 4), NumberStream],
    ids=["Dataset", "DataLoader", "stream"],
)
def test_sharded_data_is_not_shared_out_again(make: Callable[[], Any], train: bool) -> None:
    data = make()

    found = read(loader_for(data, 1, 2, train=train, batch_size=4, sharded=True))

    assert sorted(found) == list(range(13 if isinstance(data, NumberStream) else 7))


def test_two_processes_with_less_than_a_batch_each_get_none() -> None:
    loader = DataLoader(Numbers(5), 4, drop_last=True)

    assert [read(loader_for(loader, rank, 2)) for rank in range(2)] == [[], []]


def test_a_stream_for_evaluation_keeps_its_last_batch() -> None:
    options: dict[str, Any] = {"batch_size": 4, "drop_last": True}

    assert read(loader_for(NumberStream(), train=False, **options)) == list(range(13))
    assert read(loader_for(NumberStream(), train=True, **options)) == list(range(12))


def distributed(num_replicas: int, rank: int, *, batched: bool = False) -> DataLoader[Any]:
    sampler: Any = DistributedSampler(Numbers(), num_replicas, rank)
    if batched:
        return DataLoader(Numbers(), batch_sampler=BatchSampler(sampler, 4, drop_last=False))
    return DataLoader(Numbers(), 4, sampler=sampler)


@pytest.mark.parametrize("batched", [False, True])
def test_a_distributed_sampler_is_kept_and_told_the_epoch(batched: bool) -> None:
    loader = loader_for(distributed(2, 1, batched=batched), 1, 2)
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append(torch.cat(list(loader)).tolist())

    sampler: Any = DistributedSampler(Numbers(), 2, 1)
    assert epochs[0] == list(sampler)
    assert epochs[1] != epochs[0]


@pytest.mark.parametrize(
    ("replicas", "sampler_rank", "rank", "world_size"),
    [(4, 1, 1, 2), (2, 0, 1, 2), (2, 0, 0, 1)],
    ids=["other number", "other part", "one process"],
)
@pytest.mark.parametrize("batched", [False, True])
def test_a_sampler_of_other_processes_is_refused(
    replicas: int, sampler_rank: int, rank: int, world_size: int, batched: bool
) -> None:
    with pytest.raises(InvalidArgument, match=f"num_replicas={replicas}.*pass the Dataset"):
        loader_for(distributed(replicas, sampler_rank, batched=batched), rank, world_size)


def test_a_distributed_sampler_does_not_pad_evaluation() -> None:
    parts = [read(loader_for(distributed(2, rank), rank, 2, train=False)) for rank in range(2)]

    assert sorted(parts[0] + parts[1]) == list(range(13))


@pytest.mark.parametrize("transforms", [(), (abs,)], ids=["bare", "transformed"])
def test_a_dataset_is_told_the_epoch(transforms: Any) -> None:
    data = Numbers()
    loader = loader_for(data, batch_size=4, transforms=transforms)

    loader.set_epoch(3)

    assert data.epochs == [3]


def test_sample_transforms_keep_the_length_of_a_stream() -> None:
    class Sized(NumberStream):
        def __len__(self) -> int:
            return 13

    assert loader_for(Sized(), batch_size=4, transforms=(abs,)).num_batches == 4
    assert loader_for(NumberStream(), batch_size=4, transforms=(abs,)).num_batches is None


def test_sample_transforms_cannot_act_on_whole_batches() -> None:
    with pytest.raises(InvalidArgument, match="pass a Dataset or a DataLoader"):
        loader_for(iter([torch.ones(4)]), transforms=(abs,))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (TensorDataset(torch.ones(0, 5)), "TensorDataset is empty"),
        (make_data(), r"without a batch size.*data=use\('torch', batch_size="),
        (7, "data of type int cannot be read"),
    ],
)
def test_data_that_cannot_be_read_is_refused(data: Any, words: str) -> None:
    options: dict[str, Any] = {"batch_size": 4} if "empty" in words else {}

    with pytest.raises(InvalidArgument, match=words):
        loader_for(data, **options)


def test_an_empty_dataset_in_a_loader_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="TensorDataset is empty"):
        loader_for(DataLoader(TensorDataset(torch.ones(0, 5))))


@pytest.mark.parametrize(
    ("chosen", "said"), [(8, "keeps its batch_size=4, not 8"), (4, ""), (None, "")]
)
def test_a_batch_size_that_a_dataloader_does_not_take_is_said(chosen: Any, said: str) -> None:
    note: str = getattr(loader_for(DataLoader(Numbers(), 4), batch_size=chosen), "note", "")

    assert said in note
    assert bool(note) == bool(said)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "at least one sample"),
        ({"shard": True, "sharded": True}, "contradict"),
        ({"collate_fn": "mine:collate"}, "give a function of samples"),
    ],
)
def test_options_that_contradict_are_refused(options: Any, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        TorchSource(**{**OPTIONS, **options})


def test_samples_of_a_dataset_are_put_together_by_collate_fn() -> None:
    chosen = loader_for(Numbers(5), batch_size=2, collate_fn=list, train=False)

    assert list(chosen) == [[0, 1], [2, 3], [4]]


def test_a_loader_keeps_its_own_collate_fn_and_says_so() -> None:
    kept = loader_for(DataLoader(Numbers(4), 2, collate_fn=list), collate_fn=tuple)

    assert list(kept) == [[0, 1], [2, 3]]
    assert isinstance(kept, TorchLoader)
    assert kept.note == "the DataLoader keeps its own collate_fn"


# ---- lengths -------------------------------------------------------------------------------------


def test_a_stream_needs_max_steps_before_step_1() -> None:
    model = make_model()
    before = weights(model)

    with pytest.raises(InvalidArgument, match="no length: give max_steps="):
        fit(model, Stream(), settings={"data": of_dataset(), "max_epochs": 1})
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())


def test_a_stream_trains_to_max_steps() -> None:
    model, batches = make_model(), list(DataLoader(Stream(22), BATCH))

    result = fit(model, Stream(22), settings={"data": of_dataset(), "max_steps": 8})

    assert_same(model, train_by_hand(make_model(), [[b] for b in (batches * 2)[:8]]))
    assert (result.progress.epoch, result.progress.samples) == (1, 22 + 8)


def test_an_iterator_that_is_used_up_is_an_error() -> None:
    with pytest.raises(RunError, match="gave no batch in epoch 1"):
        fit(make_model(), iter(list(make_loader())), settings={"max_steps": 7})


def test_a_loader_shorter_than_it_says_is_an_error() -> None:
    class Lies(Stream):
        def __len__(self) -> int:
            return 40

    with pytest.raises(RunError, match="10 batches an epoch and gave fewer"):
        fit(make_model(), Lies(), settings={"data": of_dataset()})


def test_a_dataset_smaller_than_a_batch_with_drop_last_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="smaller batch_size"):
        fit(make_model(), make_data(3), settings={"data": of_dataset(4, drop_last=True)})


@pytest.mark.parametrize("last", [False, True])
def test_a_source_is_told_the_memory_format_of_the_weights(last: bool) -> None:
    told: list[bool] = []

    class Source(TorchSource):
        def build(self, request: LoaderRequest) -> Loader:
            told.append(request.channels_last)
            return super().build(request)

    convolution = nn.Conv2d(3, 4, 3)
    if last:
        convolution.weight.data = convolution.weight.data.to(memory_format=torch.channels_last)
    model = nn.Sequential(convolution, nn.Flatten(), nn.Linear(16, 3))
    images = TensorDataset(torch.rand(8, 3, 4, 4), torch.arange(8) % 3)
    source = Source(**{**OPTIONS, "batch_size": 4})
    data = Component("told", "a source that is told", lambda: source)
    trainer = make_trainer(data=data, max_epochs=1)

    trainer.fit(model, images, images, **arguments())
    trainer.evaluate(data=images, loss=F.cross_entropy)
    make_trainer(data=data).evaluate(model, images, loss=F.cross_entropy)

    assert told == [last] * 4


# ---- batches of any form -------------------------------------------------------------------------


@dataclasses.dataclass
class Pair:
    inputs: Tensor
    name: str


class Movable:
    """Knows how to move itself, as a graph of another library does."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def to(self, device: torch.device) -> Movable:
        return Movable(device.type)


def devices(value: Any) -> set[str]:
    if isinstance(value, (Tensor, Movable)):
        return {str(value.device)}
    if isinstance(value, Pair):
        return devices(value.inputs)
    items = value.values() if hasattr(value, "values") else value
    return set().union(*(devices(item) for item in items))


@pytest.mark.parametrize(
    "batch",
    [
        UserDict(x=torch.ones(2), inner={"y": torch.ones(2)}),
        [torch.ones(2), (torch.ones(2), [torch.ones(2)])],
        Pair(torch.ones(2), "a"),
        (Pair(torch.ones(2), "a"), Movable()),
        {"graph": Movable(), "x": torch.ones(2)},
    ],
    ids=["UserDict", "sequences", "dataclass", "movable in a tuple", "movable in a mapping"],
)
def test_a_batch_is_moved_whatever_it_is(batch: Any) -> None:
    moved = move(batch, torch.device("meta"))

    assert type(moved) is type(batch)
    assert devices(moved) == {"meta"}
    assert devices(batch) == {"cpu"}


def test_a_packed_sequence_is_moved_by_its_own_method() -> None:
    packed = pack_sequence([torch.ones(3), torch.ones(2)])

    moved, _ = move((packed, torch.zeros(2)), torch.device("meta"))

    assert isinstance(moved, PackedSequence)
    assert (moved.data.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")


class Keyed(nn.Module):
    """Takes a batch by keyword, and returns outputs as an object with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:
        logits = self.net(inputs)
        return UserDict(loss=F.cross_entropy(logits, labels), logits=logits)


def as_user_dicts(samples: list[Any]) -> Any:
    inputs, labels = torch.utils.data.default_collate(samples)
    return UserDict(inputs=inputs, labels=labels)


def test_user_dicts_train_a_model_that_returns_its_loss() -> None:
    model = Keyed()
    loader = make_loader(collate_fn=as_user_dicts)
    accuracy = {"accuracy": lambda outputs, batch: correct(outputs["logits"], batch["labels"])}

    result = fit(model, loader, loader, loss=None, metrics=accuracy)

    assert_same(model.net, train_by_hand(make_model(), [[b] for b in make_loader()]))
    assert {"val_loss", "val_accuracy"} <= result.metrics.keys()


def test_user_dicts_train_with_a_loss_of_the_whole_batch() -> None:
    class Inputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def forward(self, inputs: Tensor, labels: Tensor) -> Any:
            return self.net(inputs)

    model = Inputs()

    fit(
        model,
        make_loader(collate_fn=as_user_dicts),
        loss=lambda outputs, batch: F.cross_entropy(outputs, batch["labels"]),
    )

    assert_same(model.net, train_by_hand(make_model(), [[b] for b in make_loader()]))


# ---- real processes ------------------------------------------------------------------------------


def refused_or_trained(options: dict[str, Any]) -> str:
    settings = {"strategy": "ddp", "max_steps": 2, "data": of_dataset(**options)}
    data = DataLoader(make_data(), 4, sampler=SubsetRandomSampler(range(24)))
    try:
        fit(make_model(), data, settings=settings)
    except InvalidArgument as error:
        return str(error)
    return f"trained on {os.environ['WORLD_SIZE']}"


@pytest.mark.parametrize(
    ("options", "answer"),
    [({}, "shard=True"), ({"shard": True}, "trained on 2"), ({"sharded": True}, "trained on 2")],
)
def test_two_processes_with_a_sampler_of_the_users_own(options: Any, answer: str) -> None:
    assert all(answer in result for result in run_ranks(refused_or_trained, 2, options))
