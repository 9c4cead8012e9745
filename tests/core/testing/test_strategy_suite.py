"""The strategy suite passes an honest strategy and fails each wrong one for its own reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from torchweld.claims import Claims
from torchweld.components import Component, Settings
from torchweld.interfaces import Env, Prepared, SetupRequest, Shard, ShardReader
from torchweld.model.names import persistent_buffers
from torchweld.nesting import cast_floats
from torchweld.strategies.optimizer_state import optimizer_shards, restore_optimizer
from torchweld.testing import StrategyConformance

TOKENS = (
    "params.local",
    "params.writable",
    "params.strided",
    "params.deepcopy",
    "params.may_freeze",
    "params.may_unfreeze",
    "grads.whole",
    "grads.elementwise",
    "step.closure",
    "graph.per_rank",
    "precision.autocast",
)


class Engine:
    """Data-parallel training written out: broadcast once, average each gradient, step."""

    collective_evaluation = False

    def __init__(self, model: nn.Module, request: SetupRequest) -> None:
        self.model, self.request = model, request
        self.env, self.settings = request.env, request.settings
        self.last, self.size = True, 1
        self.norm: Any = None
        self.begin()
        groups = [{k: v for k, v in g.items() if k != "names"} for g in request.groups]
        self.optimizer = request.optimizer(groups) if request.optimizer else None

    def begin(self) -> None:
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            dist.broadcast(tensor.detach(), src=0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, self.settings.precision == "bf16"):
            return cast_floats(self.model(*args, **kwargs), torch.float32)

    def evaluate(self, *args: Any) -> Any:
        return self.forward(*args)

    def mode(self, train: bool) -> None:
        self.model.train(train)
        if not train:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)

    def window(self, last: bool, size: int) -> None:
        self.last, self.size = last, size

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss / self.size)
        if self.last:
            self.exchange()

    def exchange(self) -> None:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = self.averaged(parameter)

    def averaged(self, parameter: nn.Parameter) -> Tensor:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)
        return gradient / self.env.world_size

    def named(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def transform(self) -> None:
        for act in self.request.grad_transforms:
            act([(n, p) for n, p in self.model.named_parameters() if p.requires_grad])

    def clip(self) -> None:
        limit, algorithm = self.settings.gradient_clip_val, self.settings.gradient_clip_algorithm
        if limit is not None and algorithm == "norm":
            self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        elif limit is not None:
            nn.utils.clip_grad_value_(self.model.parameters(), limit)

    def step(self) -> bool:
        assert self.optimizer is not None
        self.transform()
        self.clip()
        self.optimizer.step()
        self.zero()
        return True

    def zero(self) -> None:
        self.model.zero_grad()

    def step_closure(self, closure: Callable[[], Tensor]) -> bool:
        assert self.optimizer is not None
        self.optimizer.step(lambda: float(closure()))
        self.zero()
        return True

    def grad_norm(self) -> Any:
        return self.norm

    def shards(self) -> Iterator[Shard]:
        if self.env.rank == 0:
            for name, tensor in (*self.model.named_parameters(), *persistent_buffers(self.model)):
                corner = (0,) * tensor.dim()
                yield Shard(f"model/{name}", tensor.detach(), tuple(tensor.shape), corner)
            if self.optimizer is not None:
                yield from optimizer_shards(self.optimizer, self.model.named_parameters())

    def restore(self, reader: ShardReader) -> None:
        for name, tensor in (*self.model.named_parameters(), *persistent_buffers(self.model)):
            reader.fill(f"model/{name}", tensor.detach(), (0,) * tensor.dim())
        self.restore_optimizer(reader)

    def restore_optimizer(self, reader: ShardReader) -> None:
        assert self.optimizer is not None
        restore_optimizer(self.optimizer, self.model.named_parameters(), reader)

    def prepared(self) -> Prepared:
        return Prepared(
            forward=self.forward,
            evaluate=self.evaluate,
            evaluate_is_collective=self.collective_evaluation,
            mode=self.mode,
            optimizer=self.optimizer,
            backward=self.backward,
            step=self.step,
            step_closure=self.step_closure,
            window=self.window,
            grad_norm=self.grad_norm,
            frozen=nullcontext,
            named_parameters=self.named,
            shards=self.shards,
            restore=self.restore,
            bytes_per_rank=dict,
        )


class ByHand:
    """The strategy around an engine."""

    backend: Mapping[str, str] = {"cpu": "gloo"}

    def __init__(self, engine: type[Engine]) -> None:
        self.engine = engine

    def construct(self, make: Callable[[], nn.Module], env: Env, settings: Settings) -> nn.Module:
        return make()

    def units(self, model: nn.Module) -> Sequence[nn.Module]:
        return (model,)

    def setup(self, model: nn.Module, request: SetupRequest) -> Prepared:
        return self.engine(model, request).prepared()

    def estimate(self, *args: Any) -> Mapping[str, int]:
        return {}

    def teardown(self) -> None:
        pass


def by_hand(engine: type[Engine], *tokens: str) -> Component:
    claims = Claims(provides=tokens or TOKENS)
    return Component("by_hand", "for these tests", partial(ByHand, engine), claims=claims)


class TestHonest(StrategyConformance):
    component = by_hand(Engine)
    collectives_per_step = 4  # one a parameter


# ---- gradients -----------------------------------------------------------------------------------


class ClipsAtOne(Engine):
    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip_val or 1.0)


class Sums(Engine):
    def averaged(self, parameter: nn.Parameter) -> Tensor:
        return super().averaged(parameter) * self.env.world_size


class NeverExchanges(Engine):
    def exchange(self) -> None:
        pass


class ForgetsZeroGrad(Engine):
    def zero(self) -> None:
        pass


class KeepsStaleGradients(Engine):
    def begin(self) -> None:
        super().begin()
        self.kept: dict[nn.Parameter, Tensor] = {}

    def averaged(self, parameter: nn.Parameter) -> Tensor:
        if parameter.grad is None and parameter in self.kept:
            parameter.grad = self.kept[parameter]
        self.kept[parameter] = super().averaged(parameter)
        return self.kept[parameter].clone()


class IgnoresWindow(Engine):
    def window(self, last: bool, size: int) -> None:
        self.last, self.size = last, self.settings.accumulate_grad_batches


class NeverDivides(Engine):
    def window(self, last: bool, size: int) -> None:
        self.last = last


class ShowsAnotherOptimizer(Engine):
    def prepared(self) -> Prepared:
        shown = SGD(self.model.parameters(), lr=1.0)
        return replace(super().prepared(), optimizer=shown)


class MovesFrozen(Engine):
    def step(self) -> bool:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.99)
        return super().step()


class ZeroesEveryModel(Engine):
    models: ClassVar[list[nn.Module]] = []

    def begin(self) -> None:
        super().begin()
        self.models.append(self.model)

    def zero(self) -> None:
        for model in self.models:
            model.zero_grad()


# ---- clipping ------------------------------------------------------------------------------------


class LocalNorm(Engine):
    def grad_norm(self) -> Any:
        return self.norm / (1 + self.env.rank)


class NormAfterClipping(Engine):
    def grad_norm(self) -> Any:
        return self.norm.clamp(max=0.5)


class NumberAsNorm(Engine):
    def grad_norm(self) -> Any:
        return float(self.norm)


class ClipsUpwards(Engine):
    def clip(self) -> None:
        limit, parameters = self.settings.gradient_clip_val, list(self.model.parameters())
        if limit is not None:
            self.norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(limit / self.norm)


class ClipsByNormOnly(Engine):
    def clip(self) -> None:
        limit = self.settings.gradient_clip_val
        if limit is not None:
            self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)


# ---- evaluation and precision --------------------------------------------------------------------


class KeepsBuffers(Engine):
    def mode(self, train: bool) -> None:
        self.model.train(train)


class EvaluatesInTraining(Engine):
    def mode(self, train: bool) -> None:
        super().mode(train)
        self.model.train()


class EvaluatesTogether(Engine):
    def evaluate(self, *args: Any) -> Any:
        dist.barrier()
        return super().evaluate(*args)


class DropsGradientsOnEvaluation(Engine):
    def evaluate(self, *args: Any) -> Any:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.9)
        return super().evaluate(*args)


class NeedsAnOptimizer(Engine):
    def prepared(self) -> Prepared:
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        return super().prepared()


class ReturnsBf16(Engine):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, self.settings.precision == "bf16"):
            outputs = self.model(*args, **kwargs)
        return outputs.float() if isinstance(outputs, Tensor) else outputs


class LosesTypes(Engine):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        return {**outputs, "inner": vars(outputs["inner"])}


class IgnoresPrecision(Engine):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class AlwaysCasts(Engine):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return cast_floats(self.model(*args, **kwargs), torch.float32)


class CommunicatesInBf16(Engine):
    def averaged(self, parameter: nn.Parameter) -> Tensor:
        gradient = super().averaged(parameter)
        return gradient.bfloat16().float() if self.settings.precision == "bf16" else gradient


# ---- what the ranks hold -------------------------------------------------------------------------


class KeepsSeeds(Engine):
    def begin(self) -> None:
        pass


class PrefixesNames(Engine):
    def named(self) -> Iterable[tuple[str, nn.Parameter]]:
        return ((f"module.{name}", p) for name, p in super().named())


class NamesTiedTwice(Engine):
    def named(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.model.named_parameters(remove_duplicate=False)


class YieldsOnEveryRank(Engine):
    def shards(self) -> Iterator[Shard]:
        for name, tensor in self.model.named_parameters():
            corner = (0,) * tensor.dim()
            yield Shard(f"model/{name}", tensor.detach(), tuple(tensor.shape), corner)


class YieldsHalf(Engine):
    def shards(self) -> Iterator[Shard]:
        for shard in super().shards():
            yield replace(shard, local=shard.local[: shard.global_shape[0] // 2 + 1])


class ForgetsOptimizerShards(Engine):
    def shards(self) -> Iterator[Shard]:
        return (shard for shard in super().shards() if shard.name.startswith("model/"))


class RestoresWeightsOnly(Engine):
    def restore_optimizer(self, reader: ShardReader) -> None:
        pass


class MeetsOnceMore(Engine):
    def step(self) -> bool:
        dist.barrier()
        return super().step()


# ---- claims --------------------------------------------------------------------------------------


class ShowsEmptyParameters(Engine):
    def named(self) -> Iterable[tuple[str, nn.Parameter]]:
        return ((n, nn.Parameter(torch.empty(0))) for n, _ in super().named())


class StepsItsOwnCopy(Engine):
    def begin(self) -> None:
        super().begin()
        self.master = [p.detach().clone() for p in self.model.parameters()]

    @torch.no_grad()
    def step(self) -> bool:
        for parameter, master in zip(self.model.parameters(), self.master, strict=True):
            parameter.copy_(master)
        applied = super().step()
        self.master = [p.detach().clone() for p in self.model.parameters()]
        return applied


class SavesItsOwnCopy(StepsItsOwnCopy):
    def shards(self) -> Iterator[Shard]:
        if self.env.rank == 0:
            for (name, _), master in zip(self.named(), self.master, strict=True):
                yield Shard(f"model/{name}", master, tuple(master.shape), (0,) * master.dim())


class FlattensStrides(Engine):
    def begin(self) -> None:
        super().begin()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.contiguous()


class CopiesItself(nn.Sequential):
    def __deepcopy__(self, memo: object) -> CopiesItself:
        return self


class SharesWithCopies(Engine):
    def begin(self) -> None:
        super().begin()
        self.model.__class__ = CopiesItself


class HasNoClosure(Engine):
    def prepared(self) -> Prepared:
        return replace(super().prepared(), step_closure=None)


class ExchangesLate(Engine):
    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss / self.size)

    def transform(self) -> None:
        self.exchange()
        super().transform()


class HidesGradients(Engine):
    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self.hidden = [p.grad for p in self.model.parameters()]
        self.model.zero_grad()

    def transform(self) -> None:
        for parameter, gradient in zip(self.model.parameters(), self.hidden, strict=True):
            parameter.grad = gradient
        super().transform()


class TransformsFrozen(Engine):
    def transform(self) -> None:
        for act in self.request.grad_transforms:
            act(list(self.model.named_parameters()))


class NeverTransforms(Engine):
    def transform(self) -> None:
        pass


class Unfreezes(Engine):
    def begin(self) -> None:
        super().begin()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for parameter in self.trainable:
            parameter.requires_grad_(True)
        return super().forward(*args, **kwargs)


class ExchangesWhatTrainedFirst(Engine):
    def begin(self) -> None:
        super().begin()
        # A list: the order of a set differs between ranks, and so would their collectives.
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]

    def exchange(self) -> None:
        for parameter in self.trainable:
            parameter.grad = self.averaged(parameter)


class AveragesOverUsers(Engine):
    def averaged(self, parameter: nn.Parameter) -> Tensor:
        users = torch.tensor(float(parameter.grad is not None))
        dist.all_reduce(users)
        return super().averaged(parameter) * self.env.world_size / users.clamp(min=1)


def plain_loop(model: nn.Module, env: Env) -> Callable[[Tensor, Tensor], None]:
    optimizer = SGD(model.parameters(), lr=0.01)

    def step(inputs: Tensor, targets: Tensor) -> None:
        torch.autograd.backward(F.cross_entropy(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()

    return step


MLP = {"model": "mlp"}
WRONG = [
    (ClipsAtOne, "test_gradients_equal_plain_pytorch", MLP, "their norm is 1.0"),
    (Sums, "test_gradients_equal_plain_pytorch", MLP, "summed over the ranks"),
    (NeverExchanges, "test_gradients_equal_plain_pytorch", MLP, "gradients differ"),
    (ForgetsZeroGrad, "test_gradients_are_zeroed_after_a_step", {}, "are gradients zeroed"),
    (KeepsStaleGradients, "test_an_unused_branch_gets_no_stale_gradient", {}, "no gradient in"),
    (NeverDivides, "test_micro_batches_equal_one_batch", {}, "4 times as large"),
    (IgnoresWindow, "test_a_short_last_window_is_divided_by_its_own_size", {}, "0.5 times as"),
    (ShowsAnotherOptimizer, "test_a_learning_rate_set_between_steps_is_used", {}, "with lr=0"),
    (MovesFrozen, "test_frozen_parameters_stay", {}, r"these moved: \['0.weight'"),
    (ZeroesEveryModel, "test_two_models_train_side_by_side", {}, "nothing moved"),
    (LocalNorm, "test_clipping_returns_the_full_norm_and_scales_by_it", {}, "equal on all ranks"),
    (NormAfterClipping, "test_clipping_returns_the_full_norm_and_scales_by_it", {}, "got 0.5"),
    (NumberAsNorm, "test_clipping_returns_the_full_norm_and_scales_by_it", {}, "plain tensor"),
    (ClipsAtOne, "test_clipping_returns_the_full_norm_and_scales_by_it", {}, "NoneType"),
    (ClipsUpwards, "test_a_clip_above_the_norm_changes_nothing", {}, "far above the norm"),
    (ClipsByNormOnly, "test_clipping_by_value", {}, "clipping by value"),
    (KeepsBuffers, "test_evaluation_is_exact_and_uses_rank_0s_buffers", {}, "rank 0's buffers"),
    (EvaluatesInTraining, "test_evaluation_is_exact_and_uses_rank_0s_buffers", {}, "changed the"),
    (
        DropsGradientsOnEvaluation,
        "test_evaluation_leaves_training_alone",
        {},
        "after an evaluation",
    ),
    (NeedsAnOptimizer, "test_setup_without_an_optimizer_evaluates", {}, "AssertionError"),
    (ReturnsBf16, "test_bf16_returns_fp32_through_any_nesting", {}, "come back in fp32"),
    (LosesTypes, "test_bf16_returns_fp32_through_any_nesting", {}, "lost its type"),
    (IgnoresPrecision, "test_bf16_returns_fp32_through_any_nesting", {}, "compute in bf16"),
    (CommunicatesInBf16, "test_bf16_is_autocast_over_fp32_parameters", {}, "torch.autocast"),
    (AlwaysCasts, "test_precision_32_casts_nothing", {}, "compute in fp32, not in"),
    (KeepsSeeds, "test_models_seeded_by_rank_become_rank_0s", {}, "rank 0's in setup"),
    (PrefixesNames, "test_names_are_the_models_own", MLP, "the model's own names"),
    (NamesTiedTwice, "test_names_are_the_models_own", {"model": "gpt"}, "also a tied one"),
    (YieldsOnEveryRank, "test_shards_cover_model_and_optimizer_once", {}, "overlap"),
    (YieldsHalf, "test_gradients_equal_plain_pytorch", MLP, "cover it exactly once"),
    (ForgetsOptimizerShards, "test_shards_cover_model_and_optimizer_once", {}, "missing"),
    (MeetsOnceMore, "test_a_step_makes_no_more_collectives_than_declared", {}, "made 5 coll"),
    (Engine, "test_a_step_makes_few_python_calls", {}, "bind in setup"),
    (ShowsEmptyParameters, "test_local_parameters_are_the_weights", {}, "shows only 0 of"),
    (SavesItsOwnCopy, "test_local_parameters_are_the_weights", {}, "exported of an average in the"),
    (StepsItsOwnCopy, "test_written_parameters_stay_written", {}, "lost in the next step"),
    (FlattensStrides, "test_parameters_keep_their_strides", {}, "strides changed"),
    (SharesWithCopies, "test_the_model_can_be_deepcopied", {}, "deep copy of the model is not"),
    (HasNoClosure, "test_a_closure_is_there_exactly_when_claimed", {}, "is None and"),
    (
        ExchangesLate,
        "test_gradients_are_there_between_backward_and_step",
        {"token": "grads.whole"},
        "gradients differ",
    ),
    (
        HidesGradients,
        "test_gradients_are_there_between_backward_and_step",
        {"token": "grads.elementwise"},
        "has no .grad",
    ),
    (TransformsFrozen, "test_gradient_transforms_act_before_the_step", {}, "once a step"),
    (NeverTransforms, "test_gradient_transforms_act_before_the_step", {}, "once a step"),
    (
        Unfreezes,
        "test_layers_change_sides_during_training",
        {"token": "params.may_freeze"},
        "has no gradient in this step, and it moved",
    ),
    (
        ExchangesWhatTrainedFirst,
        "test_layers_change_sides_during_training",
        {"token": "params.may_unfreeze"},
        "'params.may_unfreeze' is provided",
    ),
    (AveragesOverUsers, "test_ranks_may_skip_different_layers", {}, "'graph.per_rank' is provided"),
]


@pytest.mark.parametrize(
    ("engine", "test", "arguments", "message"),
    WRONG,
    ids=[f"{engine.__name__}-{test}" for engine, test, _, _ in WRONG],
)
def test_the_suite_finds(
    engine: type[Engine], test: str, arguments: Mapping[str, object], message: str
) -> None:
    class Suite(StrategyConformance):
        component = by_hand(engine)
        collectives_per_step = 4
        reference_loops = (plain_loop,)

    with pytest.raises(AssertionError, match=message):
        getattr(Suite(), test)(world_size=2, **arguments)


def test_the_suite_finds_a_restore_that_leaves_out_the_optimizer(tmp_path: Path) -> None:
    class Suite(StrategyConformance):
        component = by_hand(RestoresWeightsOnly)

    with pytest.raises(AssertionError, match=r"restore\(\) on 1 ranks of what 2 saved"):
        Suite().test_a_checkpoint_is_restored_bitwise(world_size=2, tmp_path=tmp_path)


def test_the_suite_finds_an_evaluation_that_is_a_collective_in_secret() -> None:
    class Suite(StrategyConformance):
        component = by_hand(EvaluatesTogether)
        timeout_seconds = 2.0

    with pytest.raises(AssertionError, match=r"still running|peer"):
        Suite().test_evaluation_leaves_training_alone(world_size=2)


def test_the_suite_finds_a_closure_that_is_not_claimed() -> None:
    class Suite(StrategyConformance):
        component = by_hand(Engine, "params.local")

    with pytest.raises(AssertionError, match=r"'step.closure' is not provided"):
        Suite().test_a_closure_is_there_exactly_when_claimed(world_size=2)


def test_the_suite_finds_a_word_that_claims_do_not_have() -> None:
    class Suite(StrategyConformance):
        component = by_hand(Engine, "params.locl")

    with pytest.raises(AssertionError, match=r"TW102 .*params.locl"):
        Suite().test_the_component_can_be_planned(world_size=2)


def test_the_suite_skips_what_is_not_claimed() -> None:
    class Suite(StrategyConformance):
        component = by_hand(Engine, "params.local")

    with pytest.raises(pytest.skip.Exception, match=r"does not provide 'params.writable'"):
        Suite().test_written_parameters_stay_written(world_size=2)
