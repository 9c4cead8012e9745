"""Strategy ``deepspeed``: DeepSpeed's engine in a model that knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from torchweld.errors import InvalidArgument
from torchweld.interfaces import Prepared
from torchweld.model.parameters import frozen
from torchweld.nesting import cast_floats
from torchweld.strategies.replicated import (
    broadcast_weights,
    no_step,
    place,
    prepare_replicated,
    set_mode,
)
from torchweld_deepspeed.config import make_config
from torchweld_deepspeed.drive import check_readable, trained_ids
from torchweld_deepspeed.engine import (
    Engine,
    build_in_pieces,
    grad_norm,
    is_partitioned,
    make_engine,
)
from torchweld_deepspeed.imports import replace_linear
from torchweld_deepspeed.memory import CAST, bytes_held, estimate_bytes
from torchweld_deepspeed.merging import checked_factory
from torchweld_deepspeed.options import DeepSpeedOptions, UserConfig
from torchweld_deepspeed.state import ZeroState, named_parameters

if TYPE_CHECKING:
    from torchweld.components import Settings
    from torchweld.interfaces import Env, ParameterShape, SetupRequest


class DeepSpeedStrategy:
    """Shards optimizer state (1), gradients (2) and parameters (3) over the ranks."""

    backend: Mapping[str, str] = {"cpu": "gloo", "cuda": "nccl"}

    def __init__(
        self,
        *,
        stage: Literal[0, 1, 2, 3],
        offload_optimizer: Literal["cpu", "nvme"] | None,
        offload_params: Literal["cpu", "nvme"] | None,
        nvme_path: str | None,
        bucket_elements: int | None,
        overlap_comm: bool,
        zero_init: bool,
        persistence_threshold: int,
        communication_dtype: Literal["fp32", "fp16", "bf16"] | None,
        cpu_adam: bool,
        config: UserConfig,
        verbose: bool,
    ) -> None:
        self.options = DeepSpeedOptions(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_params=offload_params,
            nvme_path=nvme_path,
            bucket_elements=bucket_elements,
            overlap_comm=overlap_comm,
            zero_init=zero_init,
            persistence_threshold=persistence_threshold,
            communication_dtype=communication_dtype,
            cpu_adam=cpu_adam,
            config=config,
            verbose=verbose,
        )
        self._engines: list[Any] = []
        self._put_back: Callable[[], None] | None = None

    def construct(self, make: Callable[[], nn.Module], env: Env, settings: Settings) -> nn.Module:
        """Build it as the user would, or cut each layer into pieces as soon as it is built."""
        if not self.options.zero_init:
            return make()
        config = make_config(self.options, settings, env, self.options.config)
        return build_in_pieces(make, env, config, verbose=self.options.verbose)

    def units(self, model: nn.Module) -> Sequence[nn.Module]:
        """The whole model."""
        return (model,)

    def setup(self, model: nn.Module, request: SetupRequest) -> Prepared:
        """Make the optimizer and give both to DeepSpeed."""
        _check_request(request)
        trains = request.optimizer is not None and any(p.requires_grad for p in model.parameters())
        if not trains and not is_partitioned(model):
            model = place(model, request)
            broadcast_weights(model, request.env)
            return prepare_replicated(model, request, wrapped=model, window=None)
        config = make_config(self.options, request.settings, request.env, self.options.config)
        factory = checked_factory(self.options, request.optimizer)
        request = replace(request, optimizer=factory)
        made = make_engine(model, request, config, verbose=self.options.verbose)
        self._engines.append(made.engine)
        if made.on_drive:
            check_readable(made.zero, model)
        if config["zero_optimization"]["memory_efficient_linear"] and self._put_back is None:
            self._put_back = replace_linear()
        return _Preparing(made, model, request).prepared()

    def estimate(
        self,
        shapes: Mapping[str, ParameterShape],
        optimizer_slots: int,
        world_size: int,
        settings: Settings,
    ) -> Mapping[str, int]:
        """Working copies, fp32 pieces, gradients and optimizer state, wherever they are kept."""
        return estimate_bytes(shapes, optimizer_slots, world_size, self.options, settings)

    def teardown(self) -> None:
        """Let DeepSpeed remove its hooks; the process group is core's."""
        for engine in self._engines:
            engine.destroy()
        self._engines.clear()
        if self._put_back is not None:
            self._put_back()
            self._put_back = None


def _check_request(request: SetupRequest) -> None:
    """Refuse what the engine would leave out without a word.

    Raises:
        InvalidArgument: clipping by value, or a transform of gradients.
    """
    settings = request.settings
    if settings.gradient_clip_val is not None and settings.gradient_clip_algorithm != "norm":
        raise InvalidArgument(
            "gradient_clip_algorithm='value' was asked for, and DeepSpeed clips by norm only: "
            "leave it at 'norm', or choose strategy='fsdp'"
        )
    if request.grad_transforms:
        raise InvalidArgument(
            f"{len(request.grad_transforms)} transforms of gradients were asked for, and "
            "DeepSpeed's engine goes from backward to the step without showing gradients: leave "
            "them out, or choose strategy='fsdp' or 'ddp'"
        )


class _Preparing:
    """Binds what a run needs of one engine."""

    def __init__(self, made: Engine, model: nn.Module, request: SetupRequest) -> None:
        self.made, self.model, self.request = made, model, request
        self.window_size = 1

    def prepared(self) -> Prepared:
        """Everything bound."""
        made, settings, env = self.made, self.request.settings, self.request.env
        state = ZeroState(made, self.model, env)
        return Prepared(
            forward=forward_of(made.engine, settings),
            evaluate=forward_of(made.engine, settings),
            evaluate_is_collective=made.stage == 3,
            mode=self._set_mode,
            optimizer=made.optimizer,
            backward=self._backward(),
            step=self._step() if made.zero is not None else no_step,
            step_closure=None,
            window=self._open if settings.accumulate_grad_batches > 1 else None,
            grad_norm=lambda: grad_norm(made.engine) if settings.gradient_clip_val else None,
            frozen=lambda: frozen(self.model.parameters()),
            named_parameters=lambda: named_parameters(self.model),
            shards=state.shards,
            restore=state.restore,
            bytes_per_rank=lambda: bytes_held(made, self.model),
            optimizer_names=made.group_names if made.zero is not None else None,
            notes=made.notes,
            working_copies=state.working_copies,
        )

    def _open(self, _last: bool, size: int) -> None:
        self.window_size = size

    def _backward(self) -> Callable[[Tensor], None]:
        backward = self.made.engine.backward
        if self.request.settings.accumulate_grad_batches > 1:
            return lambda loss: backward(loss / self.window_size, scale_wrt_gas=False)
        return partial(backward, scale_wrt_gas=False)  # unlike a lambda no call of Python's

    def _step(self) -> Callable[[], bool]:
        """Return the step; what DeepSpeed keeps of a gradient is cleared after it.

        A parameter that gets no gradient in a step would be moved by its last one again: at stage
        3, and at every stage with an offloaded optimizer, whose buffers are only ever copied into.
        Gradients on a drive are files that are never cleared: before a step all are written anew.
        """
        engine, stage = self.made.engine, self.made.stage
        zero: Any = self.made.zero
        flats = self.made.flats if self.made.offloads else []
        on_drive = self.made.on_drive
        trained = trained_ids(zero) if on_drive else []

        def step() -> bool:
            if on_drive:
                zero._offload_boundary_param_ids.update(trained)  # else only those used just now
            engine.step()
            if stage == 3:
                zero.grad_partitions_flat_buffer.zero_()
            for flat in flats:
                if flat.grad is not None:
                    flat.grad.zero_()
            applied: bool = engine._step_applied
            return applied

        return step

    def _set_mode(self, train: bool) -> None:
        self.made.engine.train(train)
        set_mode(self.model, self.request.env, train)


def forward_of(module: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """Return the forward under the precision; floating outputs come back in fp32.

    DeepSpeed's engine brings its own autocast; it casts no inputs where parameters are cast.
    """
    precision = settings.precision
    if precision == "32":
        return module
    dtype = CAST.get(precision)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            args, kwargs = cast_floats(args, dtype), cast_floats(kwargs, dtype)
        return cast_floats(module(*args, **kwargs), torch.float32)

    return forward
