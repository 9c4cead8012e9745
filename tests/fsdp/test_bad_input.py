"""What ``fsdp`` cannot do is said before step 1, on every rank, in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import LBFGS, SGD

from tests.fsdp.strategies import bench_of, case_of
from torchweld import Parts, Trainer, use
from torchweld.components import Settings
from torchweld.errors import TorchweldError
from torchweld.testing import models, run_ranks
from torchweld.testing.strategy_session import Case, prepared


class Scaled(nn.Module):
    """A linear layer with a scalar weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(33, 7), nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.scale * self.linear(inputs)
        return outputs


def mixed_dtypes() -> nn.Module:
    return nn.Sequential(nn.Linear(33, 7), nn.Linear(7, 7, dtype=torch.bfloat16))


def with_syncbatchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(33, 7), nn.SyncBatchNorm(7))


def with_lazy_layer() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(7))


def sharded_already() -> nn.Module:
    model = models.mlp()
    fully_shard(model)
    return model


def nothing(name: str, module: nn.Module) -> bool:
    return False


REFUSED: Mapping[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a predicate that matches nothing": ({"wrap": nothing}, {}, "wrap"),
    "a class that is not there": ({"wrap": "Linaer"}, {}, "did you mean 'Linear'"),
    "a unit size of nothing": ({"wrap": 0}, {}, "0"),
    "replicas that do not divide the ranks": (
        {"replicate": 3},
        {},
        "replicate=3 does not divide the 2 processes",
    ),
    "a reshard size that does not divide": (
        {"reshard_after_forward": 3},
        {},
        "reshard_after_forward=3 does not divide the 2",
    ),
    "a scalar parameter": ({}, {"make_model": Scaled}, "'scale' is a scalar"),
    "two dtypes": (
        {},
        {"make_model": mixed_dtypes},
        "'0.weight' is torch.float32 and '1.weight' is torch.bfloat16",
    ),
    "SyncBatchNorm on the CPU": (
        {},
        {"make_model": with_syncbatchnorm},
        "'1' is a SyncBatchNorm, which needs GPUs",
    ),
    "a lazy layer": ({}, {"make_model": with_lazy_layer}, "is lazy and has no shape yet"),
    "a model that is sharded": ({}, {"make_model": sharded_already}, "'the model' is sharded"),
    "LBFGS": ({}, {"optimizer": partial(LBFGS, lr=0.1)}, "LBFGS lays all parameters end to end"),
    "ignored names of nothing": (
        {"ignored": ("0.wieght",)},
        {},
        "ignored names '0.wieght', and no parameter is called so or ends with it; did you mean",
    ),
    "a forward method that is none": (
        {"forward_methods": ("encode",)},
        {},
        "forward_methods names 'encode', and Sequential has no such method",
    ),
}


def refusal(case: Case) -> str:
    with pytest.raises(TorchweldError) as caught, prepared(case):
        pass
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sharded_is_refused_by_name_on_every_rank(name: str) -> None:
    options, changes, message = REFUSED[name]
    case = case_of(bench_of("fsdp", 2, **options), models.mlp, **changes)

    for text in run_ranks(refusal, 2, case, timeout_seconds=180):
        assert message in text


def replicas(case: Case) -> str:
    try:
        with prepared(case) as session:
            return " ".join(session.prepared.notes)
    except TorchweldError as error:
        return f"refused: {error}"


def test_replicas_need_a_back_end_that_averages() -> None:
    case = case_of(bench_of("fsdp", 4, replicate=2), models.mlp)

    outcomes = run_ranks(replicas, 4, case, timeout_seconds=180)

    for outcome in outcomes:
        if torch.__version__.startswith(("2.6", "2.7")):
            assert outcome.startswith("refused: fsdp: replicate=2 averages gradients over the")
            assert "leave replicate at 1" in outcome
        else:
            assert "2 replicas of 2 shards" in outcome


def plan_problems(settings: Mapping[str, Any] | None = None, **options: Any) -> list[str]:
    trainer = Trainer(strategy=use("fsdp", **options), barebones=True, **(settings or {}))
    return [f"{p.code} {p.what}; {p.why}; {p.fix}" for p in trainer.plan.problems]


def test_offloading_needs_a_gpu_and_says_so_while_planning() -> None:
    (problem,) = plan_problems({"accelerator": "cpu"}, cpu_offload=True)

    assert problem.startswith("TW301")
    assert "leave cpu_offload out" in problem


def test_gathering_in_bf16_without_computing_in_it_is_refused_while_planning() -> None:
    (problem,) = plan_problems(param_dtype="bf16")

    assert "precision='bf16'" in problem
    assert plan_problems({"precision": "bf16"}, param_dtype="bf16") == []


def test_an_unknown_option_gets_a_suggestion() -> None:
    (problem,) = plan_problems(warp="Block")

    assert problem.startswith("TW103")
    assert "did you mean 'wrap'" in problem


def channels_last() -> nn.Module:
    model: Any = models.convnet()
    made: nn.Module = model.to(memory_format=torch.channels_last)
    return made


def notes_of(case: Case) -> list[str]:
    with prepared(case) as session:
        return list(session.prepared.notes)


def test_channels_last_weights_are_made_contiguous_and_it_is_said() -> None:
    case = case_of(bench_of("fsdp", 2), channels_last)

    for notes in run_ranks(notes_of, 2, case, timeout_seconds=180):
        assert any("2 weights in another memory format were made contiguous" in n for n in notes)


def computed_from_nothing() -> str:
    def doubled(parts: Parts) -> Parts:
        model: Any = parts.model
        model[0].weight = nn.Parameter(model[0].weight.detach() * 2)
        return parts

    data = torch.utils.data.TensorDataset(*models.features(4))
    trainer = Trainer(
        strategy="fsdp",
        data=use("torch", batch_size=2),
        surgery=[doubled],
        max_steps=1,
        barebones=True,
    )
    with pytest.raises(TorchweldError) as caught:
        trainer.fit(models.mlp, data, loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1))
    return str(caught.value)


def test_a_surgery_that_reads_deferred_weights_is_told_how_to_go_on() -> None:
    for message in run_ranks(computed_from_nothing, 2, timeout_seconds=180):
        assert "'0.weight' was computed from weights that have no values yet" in message
        assert "deferred_init=False" in message


def test_settings_are_those_of_the_plan() -> None:
    make: Callable[..., Any] = bench_of("fsdp", 2, wrap="Linear").chosen(Settings()).make

    assert make().options.wrap == "Linear"
