"""One DeepSpeed engine around one model: made so that nothing in it is left to a default.

Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", arXiv 1910.02054.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn, optim

from torchweld.errors import InvalidArgument, RunError
from torchweld.model.names import canonical
from torchweld.model.parameters import check_materialised
from torchweld.strategies.optimizing import ELEMENTWISE, make_optimizer
from torchweld_deepspeed.config import fit_buckets
from torchweld_deepspeed.imports import (
    deepspeed_at_work,
    deepspeed_module,
    first_line,
    load_drive_access,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from torchweld.interfaces import Env, ParamGroup, SetupRequest


@dataclass(frozen=True)
class Engine:
    """A model inside DeepSpeed.

    Attributes:
        engine: DeepSpeed's.
        zero: DeepSpeed's optimizer, which holds the pieces; None without an optimizer.
        optimizer: the user's, over pieces; its groups decide the next step.
        group_names: canonical names of what is trained, in each of its groups.
        stage: 1, 2 or 3.
        offloads: whether pieces and optimizer state are in host memory.
        swaps: whether anything is on a drive between two steps.
        notes: what was decided here.
    """

    engine: Any
    zero: Any | None
    optimizer: Any | None
    group_names: Sequence[Sequence[str]]
    stage: int
    offloads: bool
    swaps: bool
    notes: tuple[str, ...]

    @property
    def on_drive(self) -> bool:
        """Whether pieces, optimizer state and gradients are on a drive between two steps."""
        return self.stage == 3 and self.zero is not None and bool(self.zero.swap_optimizer)

    @property
    def flats(self) -> list[Tensor]:
        """The pieces of this rank in fp32, laid end to end, one tensor for each group or more."""
        if self.zero is None:
            return []
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        return list(self.zero.single_partition_of_fp32_groups)


def make_engine(
    model: nn.Module, request: SetupRequest, config: dict[str, Any], *, verbose: bool
) -> Engine:
    """Give ``model`` to DeepSpeed; every rank gets rank 0's weights.

    Args:
        model: bare; its parameters become pieces (stage 3) or views of flat tensors.
        request: without an optimizer only at stage 3.
        config: of ``make_config``; its buckets are made to fit the model.
        verbose: let DeepSpeed log.

    Raises:
        InvalidArgument: an optimizer that looks at more than single elements.
        RunError: an operation that was asked for cannot be compiled here.
    """
    laid_out: list[str] = []
    if is_partitioned(model):
        _hide_shapes(model)
    else:
        check_materialised(model)
        model.to(request.env.device)
        laid_out = make_contiguous(model)
    optimizer, names, notes = _make_optimizer(
        model,
        request,
        compiled=config["zero_force_ds_cpu_optimizer"]
        and _device_of(config, "offload_optimizer") != "none",
    )
    fit_buckets(config, _num_trained(model))
    _forget_exchanges(model)
    swaps = "nvme" in [_device_of(config, f"offload_{what}") for what in ("optimizer", "param")]
    with deepspeed_at_work(request.env, verbose=verbose) as deepspeed:
        if swaps:
            load_drive_access()
        engine, zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    zero = zero if optimizer is not None else None
    return Engine(
        engine=engine,
        zero=zero,
        # Of Adagrad DeepSpeed makes another one, so the given one would decide nothing.
        optimizer=zero.optimizer if zero is not None else None,
        group_names=names,
        stage=int(engine.zero_optimization_stage()),
        offloads=_device_of(config, "offload_optimizer") != "none",
        swaps=swaps,
        notes=(*laid_out, *notes),
    )


def make_contiguous(model: nn.Module) -> list[str]:
    """Lay weights out in the order of their dimensions; returns a note of it, if any were not.

    DeepSpeed views weights as bytes when it sends rank 0's, which fails in another memory format.
    """
    strided = [p for p in model.parameters() if not p.is_contiguous()]
    for parameter in strided:
        parameter.data = parameter.data.contiguous()
    if not strided:
        return []
    said = f"deepspeed: {len(strided)} weights in another memory format were made contiguous, as "
    return [said + "ZeRO lays them end to end; inputs and activations may stay channels-last"]


def check_optimizer(optimizer: Any, groups: Sequence[ParamGroup]) -> None:
    """Refuse an optimizer that ZeRO would train wrongly.

    Args:
        optimizer: made of ``groups``.
        groups: what it was to be made of.

    Raises:
        InvalidArgument: it looks at more than single elements, or DeepSpeed drops its groups.
    """
    name = type(optimizer).__name__
    if type(optimizer) not in ELEMENTWISE and not _is_deepspeeds(optimizer):
        known = ", ".join(one.__name__ for one in ELEMENTWISE)
        raise InvalidArgument(
            f"{name} may look at whole parameters or at all of them, and ZeRO lays parameters end "
            f"to end and gives each process a piece: choose one of {known}, or strategy='ddp' or "
            "'fsdp'"
        )
    if _members(optimizer.param_groups) != _members(groups):
        # DeepSpeed trains what it finds there, and says nothing of the rest.
        raise InvalidArgument(
            f"{name} was given {_counted(groups)} and has {_counted(optimizer.param_groups)}, or "
            "others: make it of the groups it is given, e.g. "
            "optimizer=functools.partial(torch.optim.AdamW, lr=1e-3)"
        )
    if isinstance(optimizer, optim.Adagrad) and not _is_uniform(optimizer):
        raise InvalidArgument(
            "DeepSpeed makes Adagrad anew with its defaults and without its parameter groups, so "
            "their learning rates would be lost: leave param_groups= out, or choose another "
            "optimizer"
        )


def _members(groups: Sequence[ParamGroup]) -> list[list[int]]:
    return [[id(parameter) for parameter in group["params"]] for group in groups]


def _counted(groups: Sequence[ParamGroup]) -> str:
    return f"{sum(len(g['params']) for g in groups)} parameters in {len(groups)} groups"


def _is_deepspeeds(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("deepspeed.ops.")


def _is_uniform(optimizer: Optimizer) -> bool:
    (first, *others) = optimizer.param_groups
    return not others and all(first[key] == value for key, value in optimizer.defaults.items())


def _compiled_adam(optimizer: Any) -> Any:
    """Return DeepSpeed's Adam for host memory with the hyper-parameters of torch's.

    Raises:
        InvalidArgument: the optimizer is no Adam.
        RunError: it cannot be compiled here.
    """
    if type(optimizer) not in (optim.Adam, optim.AdamW) or optimizer.defaults["amsgrad"]:
        raise InvalidArgument(
            f"cpu_adam=True was asked for, and the optimizer is {type(optimizer).__name__}: give "
            "Adam or AdamW without amsgrad, or leave cpu_adam out, which is exact with any"
        )
    names = ("lr", "betas", "eps", "weight_decay")
    hyper = {name: optimizer.defaults[name] for name in names}
    groups = [
        {"params": group["params"], **{name: group[name] for name in names}}
        for group in optimizer.param_groups
    ]
    adam = deepspeed_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    try:
        return adam(groups, **hyper, adamw_mode=type(optimizer) is optim.AdamW)
    except (RuntimeError, ImportError, OSError) as error:
        raise RunError(
            f"cpu_adam=True was asked for, and DeepSpeed cannot compile it here "
            f"({first_line(error)}): install "
            "a C++ compiler and ninja, or leave cpu_adam out, which is exact and needs neither"
        ) from error


def _make_optimizer(
    model: nn.Module, request: SetupRequest, *, compiled: bool
) -> tuple[Any | None, list[list[str]], list[str]]:
    """Make the user's optimizer over what is trained; also names in its groups, and notes."""
    if request.optimizer is None:
        return None, [], []
    names = {id(p): canonical(n) for n, p in model.named_parameters()}
    trained = [
        {**group, "params": [p for p in group["params"] if p.requires_grad]}
        for group in request.groups
    ]
    groups = [group for group in trained if group["params"]]
    dropped = len(trained) - len(groups)
    optimizer = make_optimizer(replace(request, groups=groups))
    check_optimizer(optimizer, groups)
    if compiled:
        optimizer = _compiled_adam(optimizer)
    notes = [f"deepspeed: {dropped} parameter groups with nothing to train left out"]
    return (
        optimizer,
        [[names[id(p)] for p in group["params"]] for group in groups],
        notes if dropped else [],
    )


def _forget_exchanges(model: nn.Module) -> None:
    """Drop in what dtype an engine before exchanged gradients: DeepSpeed notes it on parameters."""
    for parameter in model.parameters():
        vars(parameter).pop("comm_dtype", None)


def _num_trained(model: nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def _device_of(config: Mapping[str, Any], key: str) -> str:
    """Where the configuration has something wait: ``"none"``, ``"cpu"`` or ``"nvme"``."""
    offload = config["zero_optimization"].get(key) or {}
    return str(offload.get("device") or "none")


def is_partitioned(model: nn.Module) -> bool:
    """Whether the parameters of ``model`` were cut into pieces while it was built."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def build_in_pieces(
    make: Callable[[], nn.Module], env: Env, config: Mapping[str, Any], *, verbose: bool
) -> nn.Module:
    """Build a model of which no process ever holds more than its pieces; collective.

    Until :func:`make_engine` the parameters show their whole shapes without memory for them, so
    that whoever sorts them into groups by shape can; writing into one is an error.

    Args:
        make: builds the model. What a parent does to a layer after the layer's own constructor
            is lost, because the layer is in pieces by then.
        env: with a process group.
        config: of ``make_config``.
        verbose: let DeepSpeed log.
    """
    with (
        deepspeed_at_work(env, verbose=verbose) as deepspeed,
        deepspeed.zero.Init(config_dict_or_path=dict(config)),
    ):
        model = make()
    for parameter in model.parameters():
        piece: Any = parameter
        # Not a number, so that what somebody computes from it can be told from weights.
        parameter.data = parameter.data.new_full((1,), math.nan).expand(piece.ds_shape)
    return model


def _hide_shapes(model: nn.Module) -> None:
    """Undo what ``build_in_pieces`` did last.

    Raises:
        InvalidArgument: a parameter was computed from values that were in pieces.
    """
    for name, parameter in model.named_parameters():
        if getattr(parameter, "ds_status", None) is not None:
            parameter.data = parameter.data.new_empty(0)
        elif parameter.isnan().any():
            raise InvalidArgument(
                f"{name!r} was computed from weights that zero_init=True has cut into pieces, "
                "after the model was built: leave zero_init out, or compute it in the layer's own "
                "constructor"
            )


def grad_norm(engine: Any) -> Tensor | None:
    """The full norm of the last step, before clipping, as a tensor of fp32; None before it."""
    norm = engine._global_grad_norm
    return None if norm is None else torch.as_tensor(norm, dtype=torch.float32)
