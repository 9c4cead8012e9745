"""Strategy ``fsdp``: torch's FSDP2 in a model that knows nothing of it.

Source: Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor

from torchweld.components import Settings
from torchweld.errors import InvalidArgument
from torchweld.interfaces import Env, ParameterShape, Prepared, SetupRequest
from torchweld.model.names import named_parameters
from torchweld.model.parameters import frozen
from torchweld.model.precision import forward_under
from torchweld.strategies.optimizing import OptimizerStep, make_optimizer
from torchweld.strategies.replicated import (
    WindowScale,
    bytes_of,
    estimate_of,
    no_step,
    set_mode,
)
from torchweld_fsdp.checking import is_ignored
from torchweld_fsdp.deferred import Deferred, defer
from torchweld_fsdp.options import FsdpOptions, Wrap, as_names
from torchweld_fsdp.sharding import Sharded, shard_model
from torchweld_fsdp.state import ShardedState
from torchweld_fsdp.stepping import (
    Piece,
    ShardedGradients,
    average_whole,
    bytes_held,
    check_bound,
    check_optimizer,
    describe_step,
    hold,
    make_pieces,
    names_held,
    step_together,
    steps_locally,
)
from torchweld_fsdp.units import choose_units

if TYPE_CHECKING:
    from torch import Tensor, nn


class FsdpStrategy:
    """Shards parameters, gradients and optimizer state over the ranks."""

    backend: Mapping[str, str] = {"cpu": "gloo", "cuda": "nccl"}

    def __init__(
        self,
        *,
        wrap: Wrap,
        reshard_after_forward: bool | int,
        replicate: int,
        param_dtype: Literal["bf16", "fp16"] | None,
        reduce_every_micro_batch: bool,
        cpu_offload: bool,
        ignored: str | tuple[str, ...],
        forward_methods: str | tuple[str, ...],
        deferred_init: bool,
    ) -> None:
        self.options = FsdpOptions(
            wrap=wrap,
            reshard_after_forward=reshard_after_forward,
            replicate=replicate,
            param_dtype=param_dtype,
            reduce_every_micro_batch=reduce_every_micro_batch,
            cpu_offload=cpu_offload,
            ignored=as_names(ignored),
            forward_methods=as_names(forward_methods),
            deferred_init=deferred_init,
        )
        self._deferred: list[Deferred] = []
        self._notes: list[str] = []

    def construct(self, make: Callable[[], nn.Module], env: Env, settings: Settings) -> nn.Module:
        """Build the model on the meta device; ``setup`` gives its weights their values."""
        if not self.options.deferred_init:
            return make()
        model, deferred, problem = defer(make)
        if deferred is not None:
            self._deferred.append(deferred)
        if problem:
            self._notes.append(f"fsdp: every process built the whole model: {problem}")
        return model

    def units(self, model: nn.Module) -> Sequence[nn.Module]:
        """The modules that are gathered one by one, or the whole model."""
        return [module for _, module in choose_units(model, self.options.wrap).units] or (model,)

    def setup(self, model: nn.Module, request: SetupRequest) -> Prepared:
        """Shard the model, then make the optimizer over its shards."""
        sources = self._sources(model)

        def value_of(tensor: Tensor) -> Tensor:
            return next(s for s in sources if s.knows(tensor)).materialise(tensor)

        sharded = shard_model(model, request.env, request.settings, self.options, value_of=value_of)
        # A source keeps the tensors that its constructor was given, and has done its work.
        self._deferred = [deferred for deferred in self._deferred if deferred not in sources]
        notes = [*self._notes, *sharded.notes]
        self._notes.clear()
        return _Preparation(sharded, request, self.options).prepared(notes)

    def _sources(self, model: nn.Module) -> list[Deferred]:
        """Return what knows the values of ``model``; the same, or an error, on every rank.

        Raises:
            InvalidArgument: a tensor that ``construct`` did not leave out has no values.
        """
        found: list[Deferred] = []
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_meta:
                continue
            knowing = [deferred for deferred in self._deferred if deferred.knows(tensor)]
            if not knowing:
                raise InvalidArgument(
                    f"fsdp: {name!r} was computed from weights that have no values yet (a surgery "
                    "does that): build the whole model first, with deferred_init=False"
                )
            found += [deferred for deferred in knowing if deferred not in found]
        return found

    def estimate(
        self,
        shapes: Mapping[str, ParameterShape],
        optimizer_slots: int,
        world_size: int,
        settings: Settings,
    ) -> Mapping[str, int]:
        """A share of everything; rows are padded to a multiple of the ranks."""
        size = max(world_size // self.options.replicate, 1)
        whole = as_names(self.options.ignored)
        parts = {name: 1 if is_ignored(name, whole) else size for name in shapes}
        sizes = {
            name: bytes_of(one, settings, _padded(one.shape, parts[name]))
            for name, one in shapes.items()
        }
        return estimate_of(shapes, sizes, optimizer_slots)

    def teardown(self) -> None:
        """Forget how models were built; the process group is core's."""
        self._deferred.clear()


def _padded(shape: tuple[int, ...], size: int) -> int:
    """Elements that one of ``size`` ranks holds of a tensor, with padding."""
    return -(-shape[0] // size) * math.prod(shape[1:]) if shape else 1


class _Preparation:
    """Binds what a run needs of one sharded model."""

    def __init__(self, sharded: Sharded, request: SetupRequest, options: FsdpOptions) -> None:
        self.sharded, self.request, self.options = sharded, request, options
        self.model, self.env = sharded.model, request.env
        self.notes: list[str] = []
        sharded.reshard()
        root: Any = self.model
        root.set_requires_gradient_sync(True)  # an earlier run may have ended inside a window
        self.optimizer, self.pieces = self._make_optimizer()
        self.scale = WindowScale(self._tell_window)
        self.last = True

    def _make_optimizer(self) -> tuple[Any | None, list[Piece]]:
        """Make the optimizer over the model's parameters, then let it hold local tensors."""
        if self.request.optimizer is None:
            return None, make_pieces(self.model, local=False)
        optimizer = make_optimizer(_rebound(self.request, self.model))
        check_optimizer(optimizer)
        local = steps_locally(optimizer, self.request)
        pieces = make_pieces(self.model, local=local)
        if local:
            hold(optimizer, pieces)
        else:
            step_together(optimizer)
        self.notes = describe_step(optimizer, local=local)
        return optimizer, pieces

    def prepared(self, notes: list[str]) -> Prepared:
        """Everything bound, with the ``notes`` of the set-up."""
        settings, env, optimizer = self.request.settings, self.env, self.optimizer
        optimizing = self._optimizing()
        state = ShardedState(self.model, self.pieces, self.sharded.mesh, env.rank)
        forward = forward_under(self.model, settings.precision, env.device)
        return Prepared(
            forward=forward,
            evaluate=forward,
            evaluate_is_collective=True,
            mode=self._set_mode,
            optimizer=optimizer,
            backward=self._backward(optimizing.scaler if optimizing else None),
            step=optimizing.bind() if optimizing else no_step,
            step_closure=optimizing.with_closure if optimizing and not optimizing.scaler else None,
            window=self.scale.open if settings.accumulate_grad_batches > 1 else None,
            grad_norm=lambda: optimizing.norm if optimizing else None,
            frozen=self._frozen,
            named_parameters=self._named_parameters,
            shards=lambda: self._checked(state).shards(optimizer),
            restore=lambda reader: self._checked(state).restore(optimizer, reader),
            bytes_per_rank=lambda: bytes_held(self.pieces, optimizer.state if optimizer else {}),
            optimizer_names=names_held(optimizer, self.pieces) if optimizer else None,
            loss_scaler=optimizing.scaler if optimizing else None,
            notes=[*notes, *self.notes],
        )

    def _optimizing(self) -> OptimizerStep | None:
        if self.optimizer is None:
            return None
        fp16 = self.request.settings.precision == "16"
        return OptimizerStep(
            self.model,
            self.request,
            gradients=ShardedGradients(self.pieces, self.sharded.mesh["shard"].get_group()),
            optimizer=self.optimizer,
            # torch's own scaler would skip a step on the ranks whose shards overflowed alone.
            scaler=ShardedGradScaler("cuda", process_group=self.env.group) if fp16 else None,
        )

    # ---- backward and windows --------------------------------------------------------------------

    def _tell_window(self, last: bool, _size: int) -> None:
        self.last = last
        root: Any = self.model
        root.set_requires_gradient_sync(last or self.options.reduce_every_micro_batch)

    def _backward(self, scaler: Any | None) -> Callable[[Tensor], None]:
        backward = self.scale.backward(self.request.settings, scaler)
        whole = [p.parameter for p in self.pieces if not isinstance(p.parameter, DTensor)]
        if not whole or self.env.world_size == 1:
            return backward
        assert self.env.group is not None
        average = average_whole(whole, self.env.group)

        def backward_and_average(loss: Tensor) -> None:
            backward(loss)
            if self.last:
                average()

        return backward_and_average

    # ---- at borders ------------------------------------------------------------------------------

    def _set_mode(self, train: bool) -> None:
        self._check()
        set_mode(self.model, self.env, train)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        # A gathered parameter takes over whether it is trained when it is gathered, and only then.
        self.sharded.reshard()
        with frozen(self.model.parameters()):
            yield
            self.sharded.reshard()

    def _named_parameters(self) -> Iterable[tuple[str, Any]]:
        self.sharded.reshard()
        return named_parameters(self.model)

    def _checked(self, state: ShardedState) -> ShardedState:
        self._check()
        return state

    def _check(self) -> None:
        """All parameters are shards, and those that the optimizer steps."""
        self.sharded.reshard()
        check_bound(self.pieces)


def _rebound(request: SetupRequest, model: nn.Module) -> SetupRequest:
    """The request with the groups over today's parameters: FSDP2 replaced the objects."""
    named = dict(named_parameters(model))
    groups = [
        {**group, "params": [named[name] for name in group["names"]]} for group in request.groups
    ]
    return replace(request, groups=groups)
