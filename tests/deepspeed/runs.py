"""The same steps under ZeRO, another strategy, and by hand, and the states they lead to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from torchweld.builtin import DDP, SINGLE
from torchweld.components import Component, Settings
from torchweld.interfaces import Env, GroupRule, SetupRequest
from torchweld.model.parameters import make_groups
from torchweld.processes.ranks import launch
from torchweld.testing import models
from torchweld.testing.states import Kept, keep
from torchweld.testing.strategy_bench import MODELS, Bench, one_step
from torchweld.testing.strategy_session import Case, Step
from torchweld_deepspeed import DEEPSPEED
from torchweld_deepspeed.imports import deepspeed_at_work

# With 1e-8, Adam divides the rounding noise of the attention's key bias by its own size.
ADAMW = partial(AdamW, lr=1e-2, eps=1e-4, weight_decay=0.1)
WINDOWS = (4, 4, 3, 4, 1, 3)
"""Micro-batches of each step: an epoch's last window is shorter."""
SECONDS = 240.0

STAGES = (1, 2, 3)


def components() -> dict[str, tuple[Component, dict[str, Any]]]:
    """Name in these tests to component and options; ``fsdp`` where it is installed."""
    known: dict[str, tuple[Component, dict[str, Any]]] = {
        "single": (SINGLE, {}),
        "ddp": (DDP, {}),
        # Below 100 elements a parameter stays whole at stage 3, so both kinds are there.
        **{f"zero{s}": (DEEPSPEED, {"stage": s, "persistence_threshold": 100}) for s in STAGES},
    }
    if importlib.util.find_spec("torchweld_fsdp"):
        from torchweld_fsdp import FSDP

        known["fsdp"] = FSDP, {}
    return known


def bench_of(strategy: str, world_size: int, **options: Any) -> Bench:
    """The strategy of this name on so many ranks."""
    component, defaults = components()[strategy]
    return Bench(component, {**defaults, **options}, world_size, 1e-6, SECONDS)


def case_of(bench: Bench, model: str, settings: Settings | None = None, **changes: Any) -> Case:
    """A model under the strategy of ``bench``, with AdamW."""
    case = bench.case(MODELS[model][0], settings or Settings())
    return replace(case, **{"optimizer": ADAMW, **changes})


def steps_of(model: str, windows: tuple[int, ...] = (1,) * 4, lr: float = 1e-2) -> list[Step]:
    """Steps on different data, with another learning rate each."""
    return [
        one_step(model, seed=seed, num_batches=size, lr=lr / (1 + seed))
        for seed, size in enumerate(windows)
    ]


# ---- one training, two ways ----------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """What is trained, and how; the same for every way of doing it.

    Attributes:
        make_model: the model.
        steps: windows of global batches, with the learning rate of each.
        rule: of the parameter groups.
        clip: norm at which gradients are clipped.
        optimizer: over the groups.
    """

    make_model: Callable[[], nn.Module]
    steps: tuple[Step, ...]
    rule: GroupRule | None = None
    clip: float | None = 0.5
    optimizer: Callable[..., Optimizer] = ADAMW
    precision: Any = "32"


@dataclass
class Trained:
    """What one rank saw: losses of micro-batches, norms of steps, its pieces at the end."""

    losses: list[float]
    norms: list[float]
    state: list[Kept]


def training_of(model: str, **changes: Any) -> Training:
    """Six steps of unequal windows on a model of the suite."""
    return replace(Training(MODELS[model][0], tuple(steps_of(model, WINDOWS))), **changes)


def decays_matrices(name: str, _module: nn.Module, parameter: nn.Parameter) -> Mapping[str, object]:
    """Two groups, as everybody makes them: no decay on what is no matrix."""
    return {} if parameter.ndim > 1 else {"weight_decay": 0.0}


def by_zero(training: Training, options: Mapping[str, Any], *, keeps_state: bool = True) -> Trained:
    """Through the contract, on the ranks of this launch.

    Args:
        training: what to do.
        options: of the strategy.
        keeps_state: read the pieces at the end, which cannot be done on a drive.
    """
    ranks = launch("cpu")
    chosen = Bench(DEEPSPEED, options, ranks.world_size, 1e-6, SECONDS).chosen(_settings(training))
    strategy = chosen.make()
    ranks.join(strategy.backend)
    torch.manual_seed(0)
    model = training.make_model()
    groups = make_groups(model, training.rule)
    request = SetupRequest(groups, training.optimizer, (), (), ranks.env, _settings(training))
    prepared = strategy.setup(model, request)
    prepared.mode(True)
    done = Trained([], [], [])
    for step in training.steps:
        _set_lr(prepared.optimizer, step.lr)
        assert prepared.window is not None
        for index, batch in enumerate(step.window):
            if index in (0, len(step.window) - 1):
                prepared.window(index == len(step.window) - 1, len(step.window))
            loss = _loss(prepared.forward, batch, step)
            done.losses.append(loss.detach().item())
            prepared.backward(loss)
        prepared.step()
        norm = prepared.grad_norm()
        done.norms += [] if norm is None else [float(norm)]
    if keeps_state:
        done.state = [k for k in keep(prepared.shards()) if k.name.startswith("model/")]
    strategy.teardown()
    return done


def by_hand(training: Training, *, zeros: bool = False) -> Trained:
    """DDP as every tutorial shows it.

    Args:
        training: what to do.
        zeros: give a parameter without gradient one of zeros, as ZeRO does.
    """
    ranks = launch("cpu")
    ranks.join({"cpu": "gloo"})
    torch.manual_seed(0)
    model = training.make_model()
    groups = make_groups(model, training.rule)  # a rule may freeze
    wrapped = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=zeros)
    optimizer = training.optimizer([{k: v for k, v in g.items() if k != "names"} for g in groups])
    done = Trained([], [], [])
    for step in training.steps:
        _set_lr(optimizer, step.lr)
        for index, batch in enumerate(step.window):
            wrapped.require_backward_grad_sync = index == len(step.window) - 1
            with torch.autocast("cpu", torch.bfloat16, training.precision == "bf16"):
                loss = _loss(wrapped, batch, step)
            done.losses.append(loss.detach().item())
            torch.autograd.backward(loss / len(step.window))
        if zeros:
            _fill_with_zeros(model)
        if training.clip is not None:
            done.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), training.clip)))
        optimizer.step()
        optimizer.zero_grad()
    if ranks.rank == 0:
        done.state = [
            Kept(f"model/{name}", t.detach().clone(), tuple(t.shape), (0,) * t.dim())
            for name, t in (*model.named_parameters(), *model.named_buffers())
        ]
    return done


def by_engine(training: Training, config: Mapping[str, Any]) -> Trained:
    """DeepSpeed's engine as its own examples show it, with this much of a configuration.

    The module ``deepspeed`` is imported as the plugin does it, so that nothing is compiled.
    """
    ranks = launch("cpu")
    ranks.join({"cpu": "gloo"})
    torch.manual_seed(0)
    engine = initialized(training.make_model(), training, ranks.env, config)
    done = Trained([], [], [])
    for step in training.steps:
        _set_lr(engine.optimizer, step.lr)
        for batch in step.window:
            loss = _loss(engine, batch, step)
            done.losses.append(loss.detach().item())
            engine.backward(loss / len(step.window), scale_wrt_gas=False)
        engine.step()
    engine.destroy()
    return done


def initialized(
    model: nn.Module,
    training: Training,
    env: Env,
    config: Mapping[str, Any],
) -> Any:
    """Return an engine over the model's groups, as nobody but DeepSpeed makes it."""
    groups = make_groups(model, training.rule)
    optimizer = training.optimizer([{k: v for k, v in g.items() if k != "names"} for g in groups])
    with deepspeed_at_work(env, verbose=False) as deepspeed:
        return deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))[0]


def told(stage: int, **zero: Any) -> dict[str, Any]:
    """A configuration with small buckets, no clipping and windows of the caller's own."""
    small = {"reduce_bucket_size": 4096, "allgather_bucket_size": 4096}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "overlap_comm": False, **small, **zero},
    }


def _settings(training: Training) -> Settings:
    return Settings(
        accumulate_grad_batches=max(WINDOWS),
        gradient_clip_val=training.clip,
        precision=training.precision,
    )


def _loss(forward: Callable[..., Any], batch: tuple[Tensor, Tensor], step: Step) -> Tensor:
    inputs, targets = batch
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    return F.cross_entropy(forward(inputs[mine], **step.forward).float(), targets[mine])


def _set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _fill_with_zeros(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def branching_steps() -> tuple[Step, ...]:
    """Steps that use the branch of :class:`~torchweld.testing.models.Branching` in turn."""
    return tuple(
        replace(step, forward={"branch": index % 2 == 0})
        for index, step in enumerate(steps_of("mlp", (1,) * 6))
    )


def branching() -> Training:
    """A model whose branch gets no gradient in every second step."""
    return Training(models.Branching, branching_steps())


# ---- comparing -----------------------------------------------------------------------------------


def different(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Names that are not bitwise equal, or on one side only."""
    return sorted(
        name
        for name in left.keys() | right.keys()
        if name not in left or name not in right or not left[name].equal(right[name])
    )


def largest_difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Over all weights."""
    names = [name for name in left if name.startswith("model/")]
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in names)
