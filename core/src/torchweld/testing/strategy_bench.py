"""What the tests of the strategy suite are written with: one strategy on so many ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchweld.components import Chosen, Component, Settings, Use
from torchweld.errors import TorchweldError
from torchweld.planning import make_plan
from torchweld.testing import models
from torchweld.testing import strategy_jobs as jobs
from torchweld.testing.processes import RanksFailed, run_ranks
from torchweld.testing.registry import empty_registry
from torchweld.testing.states import assemble, assert_same_gradients, weights
from torchweld.testing.strategy_session import (
    DEFAULTS,
    LR,
    Case,
    Pair,
    Step,
    Trace,
    plain_model,
    scaled_loss,
)
from torchweld.vocabulary import proofs

MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[..., Pair]]] = {
    "mlp": (models.mlp, models.features),
    "frozen": (models.frozen_mlp, models.features),
    "convnet": (models.convnet, models.images),
    "gpt": (models.TinyGpt, models.tokens),
}
"""Name to model and data, for the tests that run on each."""

MICRO_BATCH = 8  # samples of all ranks together
SMALLEST_NORM = 32.0


@dataclass(frozen=True)
class Bench:
    """One strategy on one number of ranks."""

    component: Component
    options: Mapping[str, object]
    world_size: int
    tolerance: float
    timeout_seconds: float

    # ---- cases ---------------------------------------------------------------------------------

    def chosen(self, settings: Settings = DEFAULTS, **facts: bool) -> Chosen:
        """The component with its options, as a plan for this many ranks adapts them.

        Args:
            settings: of the plan.
            facts: tokens that hold, with ``_`` for ``.``: ``graph_random=True``.
        """
        known = {name.replace("_", ".", 1): value for name, value in facts.items()}
        plan = make_plan(
            empty_registry(),
            strategy=Use(self.component, self.options),
            data="torch",
            settings=settings,
            facts={"world>1": self.world_size > 1, **known},
        )
        errors = [f"{p.code} {p.what}. {p.why}" for p in plan.problems if p.severity == "error"]
        assert not errors, f"the component cannot be planned on {self.world_size} ranks: {errors}"
        assert plan.strategy is not None
        return plan.strategy

    def case(
        self,
        make_model: Callable[[], nn.Module] | str,
        settings: Settings = DEFAULTS,
        **facts: bool,
    ) -> Case:
        """A model under this strategy, its loss scaled so that the gradient norm is above 10."""
        if isinstance(make_model, str):
            first, make_model = one_step(make_model), MODELS[make_model][0]
            case = Case(self.chosen(settings, **facts), make_model, settings)
            plain_norm = norm_of(plain_gradients(replace(case, settings=DEFAULTS), first))
            return replace(case, scale=2.0 ** math.ceil(math.log2(SMALLEST_NORM / plain_norm)))
        return Case(self.chosen(settings, **facts), make_model, settings)

    def needs(self, token: str, settings: Settings = DEFAULTS, **facts: bool) -> None:
        """Skip the test unless the strategy provides ``token``."""
        if not self.provides(token, settings, **facts):
            pytest.skip(f"{self.component.name} does not provide {token!r}")

    def provides(self, token: str, settings: Settings = DEFAULTS, **facts: bool) -> bool:
        """Whether the claims provide ``token``."""
        provided = self.chosen(settings, **facts).claims(settings).provides
        given = {provided} if isinstance(provided, str) else set(provided)
        return not given.isdisjoint(proofs(token))

    # ---- running -------------------------------------------------------------------------------

    def run(self, job: Callable[..., Any], *args: Any, ranks: int | None = None) -> list[Any]:
        """Run a job on the ranks; results by rank."""
        seconds = self.timeout_seconds
        return run_ranks(job, ranks or self.world_size, *args, timeout_seconds=seconds)

    def run_or_skip(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """As :meth:`run`, for a setting that a strategy may refuse with an error of torchweld."""
        try:
            return self.run(job, *args)
        except RanksFailed as failed:
            if isinstance(failed.failures[0].error, TorchweldError):
                pytest.skip(f"refused: {failed.failures[0].message}")
            raise

    def train(self, case: Case, *steps: Step) -> list[dict[str, Tensor]]:
        """Take the steps; the state before the first, and after each."""
        traces = self.run(jobs.train, case, steps)
        refused = [i for t in traces for i, applied in enumerate(t.applied) if applied is not True]
        assert not refused, "step() must return True when it was applied (False: fp16 skipped it)"
        return states_of(traces)

    # ---- comparing -----------------------------------------------------------------------------

    def compare(self, traces: Sequence[Trace], expected: Mapping[str, Tensor], what: str) -> None:
        """Compare the gradients of the last step that the ranks took with the expected ones."""
        self.compare_gradients(gradients_between(*states_of(traces)[-2:]), expected, what)

    def compare_gradients(
        self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str
    ) -> None:
        """Compare gradients within the suite's tolerance."""
        assert_same_gradients(
            found, expected, self.tolerance, what=what, world_size=self.world_size
        )

    def check_gradients(self, case: Case, *steps: Step, what: str) -> None:
        """Take the steps, and hold the gradients of the last one to plain PyTorch's."""
        states = self.train(case, *steps)
        found = gradients_between(*states[-2:])
        self.compare_gradients(found, plain_gradients(case, steps[-1]), what)


def one_step(model: str, *, seed: int = 0, num_batches: int = 1, **changes: Any) -> Step:
    """A step over ``num_batches`` global batches for a model of :data:`MODELS`."""
    make_data = MODELS[model][1]
    window = tuple(make_data(MICRO_BATCH, seed=100 * seed + i) for i in range(num_batches))
    return replace(Step(window), **changes)


def plain_gradients(case: Case, step: Step, *, shares: int = 1) -> dict[str, Tensor]:
    """Gradients that plain PyTorch has for a step, from the seeded weights; zero for none.

    Args:
        case: its strategy is not used.
        step: its window is one batch here.
        shares: mean over so many equal parts, for models that treat the ranks differently.
    """
    model = plain_model(case).train()
    inputs, targets = (torch.cat(tensors) for tensors in zip(*step.window, strict=True))
    for rank in range(shares):
        forward = dict(step.forward)
        if step.branch_by_rank:
            forward["branch"] = rank == 0
        with torch.autocast("cpu", torch.bfloat16, case.settings.precision == "bf16"):
            outputs = model(inputs[rank::shares], **forward)
        loss = scaled_loss(outputs.float(), targets[rank::shares], case.scale)
        torch.autograd.backward(loss / shares)
    named = model.named_parameters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}


def states_of(traces: Sequence[Trace]) -> list[dict[str, Tensor]]:
    """The states that the ranks saw, each put together from the pieces of all."""
    return [assemble(pieces) for pieces in zip(*(t.states for t in traces), strict=True)]


def gradients_between(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Read the gradients of one plain SGD step off the weights, buffers left out."""
    w0, w1 = weights(before), weights(after)
    return {n: (w0[n] - w1[n]) / LR for n in w0 if w0[n].is_floating_point()}


def norm_of(gradients: Mapping[str, Tensor]) -> float:
    """Norm of all gradients together."""
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def flipped(make_model: Callable[[], nn.Module], prefix: str) -> Callable[[], nn.Module]:
    """The model with everything under ``prefix`` frozen that trains, and the other way round."""
    return partial(_flip, make_model, prefix)


def _flip(make_model: Callable[[], nn.Module], prefix: str) -> nn.Module:
    model = make_model()
    for name, parameter in model.named_parameters():
        if name.startswith(prefix):
            parameter.requires_grad_(not parameter.requires_grad)
    return model


def channels_last_convnet() -> nn.Module:
    """The conv net with its weights in channels-last order."""
    model = models.convnet()
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


# ---- single checks -------------------------------------------------------------------------------


def check_outputs(found: Tensor, expected: Tensor, what: str) -> None:
    """Compare outputs with plain PyTorch's: equal up to the order of sums."""
    found, expected = found.detach(), expected.detach()
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= 1e-6, f"{what}: outputs differ from plain PyTorch's by {error:.1e}"


def check_buffers(buffers: Mapping[str, Tensor], state: Mapping[str, Tensor], rank: int) -> None:
    """Compare a rank's buffers with those that are saved, which are rank 0's."""
    wrong = [n for n, b in buffers.items() if not torch.equal(b, state[n])]
    assert not wrong, (
        f"after mode(False) every rank must have rank 0's buffers, and rank {rank} has others: "
        f"{wrong}; broadcast them"
    )


def check_nested(outputs: Any) -> None:
    """Check the outputs of :class:`~torchweld.testing.models.Nested`."""
    assert isinstance(outputs, Mapping), f"a mapping became {type(outputs).__name__}"
    assert isinstance(outputs["inner"], models.Inner), "a dataclass in the outputs lost its type"
    assert outputs["inner"].argmax.dtype == torch.int64, "integer outputs must stay integers"
    places = {
        "outputs['logits']": outputs["logits"],
        "a dataclass in outputs": outputs["inner"].hidden,
        "a tuple in outputs": outputs["pair"][0],
    }
    wrong = {place: t.dtype for place, t in places.items() if t.dtype != torch.float32}
    assert not wrong, f"floating outputs must come back in fp32 through any nesting, got {wrong}"


def check_norms(traces: Sequence[Trace], norm: float) -> None:
    """Check what ``grad_norm()`` gave after the last step."""
    found = [trace.norms[-1] for trace in traces]
    kinds = {kind for _, kind in found}
    assert kinds == {"Tensor"}, f"grad_norm() must be a plain tensor when clipping, got {kinds}"
    values = [value for value, _ in found]
    assert len(set(values)) == 1, f"grad_norm() must be equal on all ranks, got {values}"
    error = abs(values[0] / norm - 1) if values[0] is not None else math.inf
    assert error <= 1e-6, (
        f"grad_norm() must be the norm of the whole gradient before clipping, {norm:.6g}; got "
        f"{values[0]:.6g} (is it this rank's part only, or taken after clipping?)"
    )


def check_readable(name: str, whole: Tensor, by_rank: Sequence[Tensor]) -> None:
    """Check that the ranks together can read the values of a parameter."""
    claim = f"'params.local' is provided, but between two steps {name!r}"
    if all(part.shape == whole.shape for part in by_rank):
        different = [rank for rank, part in enumerate(by_rank) if not torch.equal(part, whole)]
        assert not different, f"{claim} is not the weight that is saved, on ranks {different}"
        return
    held = sum(part.numel() for part in by_rank)
    assert held >= whole.numel(), f"{claim} shows only {held} of {whole.numel()} values"


def check_shapes(
    found: Mapping[str, tuple[tuple[int, ...], Any]], whole: Mapping[str, Tensor], token: str
) -> None:
    """Check that a rank has the gradient of what it holds, or all of it."""
    for name, (shape, gradient) in found.items():
        claim = f"{token!r} is provided, but between backward and step {name!r}"
        assert gradient is not None or math.prod(shape) == 0, f"{claim} has no .grad"
        wanted = tuple(whole[name].shape) if token == "grads.whole" else shape
        assert gradient is None or tuple(gradient.shape) == wanted, (
            f"{claim} has a .grad of shape {tuple(gradient.shape)}, not {wanted}"
        )
