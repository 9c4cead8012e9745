"""The conformance suite of strategies: held against plain PyTorch, through the contract alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.optim import SGD, AdamW

from torchweld.components import Component, Settings
from torchweld.testing import models
from torchweld.testing import strategy_jobs as jobs
from torchweld.testing.states import assemble, assert_same_state, weights
from torchweld.testing.strategy_bench import (
    MODELS,
    Bench,
    channels_last_convnet,
    check_buffers,
    check_nested,
    check_norms,
    check_outputs,
    check_readable,
    check_shapes,
    flipped,
    norm_of,
    one_step,
    plain_gradients,
)
from torchweld.testing.strategy_jobs import ReferenceLoop
from torchweld.testing.strategy_session import plain_model

# A smaller eps would divide rounding noise by its own size where the true gradient is 0, as of
# the key bias of an attention.
ADAMW = partial(AdamW, lr=1e-2, eps=1e-4, weight_decay=0.1)


class StrategyConformance:
    """Subclass it with ``component = …`` and pytest holds your strategy to the contract.

    Gradients are read as ``(w0 - w1) / lr`` of one plain SGD step, with a loss so large that their
    norm is above 10: a clip at 1.0 that nobody asked for would be invisible below 1.

    Attributes:
        component: the strategy's.
        options: its options, where they are not the defaults.
        world_sizes: numbers of processes to run it with.
        tolerance: largest relative error of a gradient.
        collectives_per_step: at most so many for one step of an MLP; None leaves them uncounted.
        reference_loops: one module-level ``(model, env) -> step``, your back end by hand, which a
            step may exceed by 5 Python calls; empty leaves them uncounted.
        timeout_seconds: of one job; ranks that hang are ended and named.
    """

    component: ClassVar[Component]
    options: ClassVar[Mapping[str, object]] = {}
    world_sizes: ClassVar[Sequence[int]] = (1, 2)
    tolerance: ClassVar[float] = 1e-6
    collectives_per_step: ClassVar[int | None] = None
    # A tuple, because a bare function in a class would become a method.
    reference_loops: ClassVar[Sequence[ReferenceLoop]] = ()
    timeout_seconds: ClassVar[float] = 60.0

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test for every world size and model that it asks for."""
        if "world_size" in metafunc.fixturenames:
            metafunc.parametrize("world_size", self.world_sizes)
        if "model" in metafunc.fixturenames:
            metafunc.parametrize("model", MODELS)

    def bench(self, world_size: int) -> Bench:
        """The strategy on so many ranks."""
        return Bench(self.component, self.options, world_size, self.tolerance, self.timeout_seconds)

    def test_the_component_can_be_planned(self, world_size: int) -> None:
        self.bench(world_size).chosen()

    # ---- gradients -----------------------------------------------------------------------------

    def test_gradients_equal_plain_pytorch(self, world_size: int, model: str) -> None:
        bench = self.bench(world_size)
        bench.check_gradients(bench.case(model), one_step(model), what="one step")

    def test_gradients_are_zeroed_after_a_step(self, world_size: int) -> None:
        bench = self.bench(world_size)
        steps = one_step("mlp", lr=0.0), one_step("mlp", seed=1)
        what = "a second step (are gradients zeroed after the first?)"
        bench.check_gradients(bench.case("mlp"), *steps, what=what)

    def test_an_unused_branch_gets_no_stale_gradient(self, world_size: int) -> None:
        bench = self.bench(world_size)
        case = replace(bench.case("mlp", graph_random=True), make_model=models.Branching)
        steps = one_step("mlp", lr=0.0), one_step("mlp", seed=1, forward={"branch": False})
        bench.check_gradients(
            case, *steps, what="a step that leaves out a branch (stale gradient?)"
        )

    def test_micro_batches_equal_one_batch(self, world_size: int) -> None:
        bench = self.bench(world_size)
        case = bench.case("mlp", Settings(accumulate_grad_batches=4))
        whole = one_step("mlp", num_batches=4)
        bench.check_gradients(case, whole, what="a window of 4 micro-batches")

    def test_a_short_last_window_is_divided_by_its_own_size(self, world_size: int) -> None:
        bench = self.bench(world_size)
        case = bench.case("mlp", Settings(accumulate_grad_batches=4))
        steps = one_step("mlp", num_batches=4, lr=0.0), one_step("mlp", seed=4, num_batches=2)
        bench.check_gradients(case, *steps, what="a short window of 2 after one of 4")

    def test_a_learning_rate_set_between_steps_is_used(self, world_size: int) -> None:
        bench = self.bench(world_size)
        before, after = bench.train(bench.case("mlp"), one_step("mlp", lr=0.0))

        what = "a step with lr=0 in optimizer.param_groups moved something"
        assert_same_state(weights(after), weights(before), what=what)

    def test_frozen_parameters_stay(self, world_size: int) -> None:
        bench = self.bench(world_size)
        case = replace(bench.case("frozen"), optimizer=ADAMW)
        before, after = map(weights, bench.train(case, one_step("frozen", lr=0.1)))

        frozen = [n for n, p in models.frozen_mlp().named_parameters() if not p.requires_grad]
        moved = [n for n in frozen if not torch.equal(before[n], after[n])]
        assert not moved, f"frozen parameters must stay as they are, and these moved: {moved}"

    def test_two_models_train_side_by_side(self, world_size: int) -> None:
        bench, step = self.bench(world_size), one_step("mlp")
        first = bench.case("mlp")
        second = replace(first, seed=7)
        by_rank = bench.run(jobs.two_models, first, second, step)

        for case, traces in zip((first, second), zip(*by_rank, strict=True), strict=True):
            expected = plain_gradients(case, step)
            bench.compare(traces, expected, "two models under one strategy")

    # ---- clipping ------------------------------------------------------------------------------

    def test_clipping_returns_the_full_norm_and_scales_by_it(self, world_size: int) -> None:
        bench, step = self.bench(world_size), one_step("mlp")
        case = bench.case("mlp", Settings(gradient_clip_val=0.5))
        traces = bench.run(jobs.train, case, [step])

        gradients = plain_gradients(case, step)
        norm = norm_of(gradients)
        check_norms(traces, norm)
        clipped = {n: g * (0.5 / (norm + 1e-6)) for n, g in gradients.items()}
        bench.compare(traces, clipped, "clipping by norm to 0.5")

    def test_a_clip_above_the_norm_changes_nothing(self, world_size: int) -> None:
        bench = self.bench(world_size)
        case = bench.case("mlp", Settings(gradient_clip_val=1e6))
        bench.check_gradients(case, one_step("mlp"), what="a clip far above the norm")

    def test_clipping_by_value(self, world_size: int) -> None:
        bench, step = self.bench(world_size), one_step("mlp")
        settings = Settings(gradient_clip_val=1.0, gradient_clip_algorithm="value")
        case = bench.case("mlp", settings)
        traces = bench.run_or_skip(jobs.train, case, [step])

        clipped = {n: g.clamp(-1.0, 1.0) for n, g in plain_gradients(case, step).items()}
        bench.compare(traces, clipped, "clipping by value to 1.0")

    # ---- evaluation ----------------------------------------------------------------------------

    def test_evaluation_is_exact_and_uses_rank_0s_buffers(self, world_size: int) -> None:
        bench = self.bench(world_size)
        case = bench.case(models.batchnorm_convnet)
        inputs, _ = models.images(6, seed=9)
        by_rank = bench.run(jobs.evaluate, case, one_step("convnet", lr=0.01), inputs)

        before, after = (weights(assemble(p)) for p in list(zip(*by_rank, strict=True))[:2])
        assert_same_state(after, before, what="evaluate() changed the model")
        expected = plain_model(case, before).eval()(inputs)
        for rank, (_, _, outputs, buffers) in enumerate(by_rank):
            check_buffers(buffers, before, rank)
            check_outputs(outputs, expected, f"evaluate() on rank {rank}")

    def test_evaluation_leaves_training_alone(self, world_size: int) -> None:
        bench = self.bench(world_size)
        case, steps = bench.case("mlp"), (one_step("mlp", lr=0.0), one_step("mlp", seed=1))
        traces = bench.run(jobs.evaluate_between, case, steps, steps[0].window[0][0])

        bench.compare(traces, plain_gradients(case, steps[1]), "training after an evaluation")

    def test_setup_without_an_optimizer_evaluates(self, world_size: int) -> None:
        bench, step = self.bench(world_size), one_step("mlp")
        case = replace(bench.case("mlp"), optimizer=None)
        by_rank = bench.run(jobs.evaluate, case, step, step.window[0][0])

        expected = plain_model(case).eval()(step.window[0][0])
        for rank, (_, _, outputs, _) in enumerate(by_rank):
            check_outputs(outputs, expected, f"evaluate() without an optimizer on rank {rank}")

    # ---- precision -----------------------------------------------------------------------------

    def test_bf16_returns_fp32_through_any_nesting(self, world_size: int) -> None:
        bench = self.bench(world_size)
        case = bench.case(models.Nested, Settings(precision="bf16"))

        for *outputs, seen in bench.run_or_skip(jobs.outputs_of, case, models.features(6)[0]):
            for each in outputs:
                check_nested(each)
            assert seen == torch.bfloat16, f"precision='bf16' must compute in bf16, not in {seen}"

    def test_bf16_is_autocast_over_fp32_parameters(self, world_size: int) -> None:
        bench, step = self.bench(world_size), one_step("mlp")
        settings = Settings(precision="bf16")
        bench.needs("precision.autocast", settings)
        case = bench.case("mlp", settings)
        traces = bench.run_or_skip(jobs.train, case, [step])

        (expected,) = bench.run(partial(plain_gradients, case, step, shares=world_size), ranks=1)
        bench.compare(traces, expected, "precision='bf16' against torch.autocast")

    def test_precision_32_casts_nothing(self, world_size: int) -> None:
        bench = self.bench(world_size)
        case = bench.case(models.Nested)

        for outputs, _, seen in bench.run(jobs.outputs_of, case, models.features(6)[0]):
            check_nested(outputs)
            assert seen == torch.float32, f"precision='32' must compute in fp32, not in {seen}"

    # ---- what the ranks hold -------------------------------------------------------------------

    def test_models_seeded_by_rank_become_rank_0s(self, world_size: int) -> None:
        bench, step = self.bench(world_size), one_step("mlp", lr=0.0)
        case = replace(bench.case("mlp"), seed_by_rank=True)
        by_rank = bench.run(jobs.evaluate, case, step, step.window[0][0])

        expected = plain_model(case).eval()(step.window[0][0])
        for rank, (_, _, outputs, _) in enumerate(by_rank):
            what = f"models seeded differently must become rank 0's in setup(); rank {rank}"
            check_outputs(outputs, expected, what)

    def test_models_to_evaluate_that_were_seeded_by_rank_become_rank_0s(
        self, world_size: int
    ) -> None:
        bench, step = self.bench(world_size), one_step("mlp")
        case = replace(bench.case("mlp"), optimizer=None, seed_by_rank=True)
        by_rank = bench.run(jobs.evaluate, case, step, step.window[0][0])

        expected = plain_model(case).eval()(step.window[0][0])
        for rank, (_, _, outputs, _) in enumerate(by_rank):
            check_outputs(outputs, expected, f"evaluate() of rank 0's weights on rank {rank}")

    def test_names_are_the_models_own(self, world_size: int, model: str) -> None:
        bench = self.bench(world_size)
        expected = sorted(n for n, _ in MODELS[model][0]().named_parameters())

        for names in bench.run(jobs.names_of, bench.case(model)):
            assert sorted(names) == expected, (
                f"named_parameters() must give the model's own names, each (also a tied one) once: "
                f"got {sorted(names)} instead of {expected}"
            )

    def test_shards_cover_model_and_optimizer_once(self, world_size: int) -> None:
        bench = self.bench(world_size)
        case = replace(bench.case(models.batchnorm_convnet), optimizer=ADAMW)
        _, state = bench.train(case, one_step("convnet", lr=0.01))

        model = models.batchnorm_convnet()
        expected = {f"model/{n}" for n in model.state_dict()}
        for name, _ in model.named_parameters():
            expected |= {f"optim/{name}/{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
        missing, extra = sorted(expected - state.keys()), sorted(state.keys() - expected)
        assert not missing and not extra, f"shards(): missing {missing}, not expected {extra}"

    def test_a_checkpoint_is_restored_bitwise(self, world_size: int, tmp_path: Path) -> None:
        bench, path = self.bench(world_size), str(tmp_path / "checkpoint")
        case = replace(bench.case("gpt"), optimizer=ADAMW)
        *steps, after = (one_step("gpt", seed=seed, lr=1e-2) for seed in range(4))
        by_rank = bench.run(jobs.save, case, steps, path, after)
        saved, continued = (assemble(kept) for kept in zip(*by_rank, strict=True))

        dirty = one_step("gpt", seed=9, lr=1e-2)
        for other in self.world_sizes:
            args = replace(case, seed=5), dirty, path, after
            by_rank = bench.run(jobs.resume, *args, ranks=other)
            restored, resumed = (assemble(kept) for kept in zip(*by_rank, strict=True))
            what = f"restore() on {other} ranks of what {world_size} saved"
            assert_same_state(restored, saved, what=what)
            if other == world_size:
                assert_same_state(resumed, continued, what=f"the step after {what}")

    # ---- speed ---------------------------------------------------------------------------------

    def test_a_step_makes_no_more_collectives_than_declared(self, world_size: int) -> None:
        if self.collectives_per_step is None:
            pytest.skip("collectives_per_step is not declared")
        bench = self.bench(world_size)

        for calls in bench.run(jobs.collectives, bench.case("mlp"), one_step("mlp")):
            assert len(calls) <= self.collectives_per_step, (
                f"a step made {len(calls)} collectives ({', '.join(calls)}); declared are "
                f"{self.collectives_per_step}"
            )

    def test_a_step_makes_few_python_calls(self, world_size: int) -> None:
        if not self.reference_loops:
            pytest.skip("reference_loops is not declared")
        bench, (batch,) = self.bench(world_size), one_step("mlp").window
        case = replace(bench.case("mlp"), optimizer=partial(SGD, lr=0.01))

        for ours, theirs in bench.run(jobs.python_calls, case, self.reference_loops[0], batch):
            assert ours <= theirs + 5, (
                f"a step makes {ours:g} Python calls and the loop by hand {theirs:g}, more than 5 "
                "above it: bind in setup() what can be bound there"
            )

    # ---- claims --------------------------------------------------------------------------------

    def test_local_parameters_are_the_weights(self, world_size: int) -> None:
        bench = self.bench(world_size)
        bench.needs("params.local")
        by_rank = bench.run(jobs.read_parameters, bench.case("mlp"), one_step("mlp"))

        kept, shown, exported = (list(each) for each in zip(*by_rank, strict=True))
        saved, found = (weights(assemble(each)) for each in (kept, exported))
        for name, whole in saved.items():
            check_readable(name, whole, [named[name] for named in shown])
        halved = {n: t * 0.5 for n, t in saved.items()}
        claim = "'params.local' is provided, but what is exported of an average in the parameters"
        assert_same_state(found, halved, what=f"{claim} (working_copies, or shards)")

    def test_written_parameters_stay_written(self, world_size: int) -> None:
        bench = self.bench(world_size)
        bench.needs("params.writable")
        by_rank = bench.run(jobs.write_parameters, bench.case("mlp"), one_step("mlp"))

        before, written, later = (weights(assemble(kept)) for kept in zip(*by_rank, strict=True))
        halved = {n: t * 0.5 for n, t in before.items()}
        claim = "'params.writable' is provided, but what is written into a parameter"
        assert_same_state(written, halved, what=f"{claim} is not what is saved")
        assert_same_state(later, halved, what=f"{claim} is lost in the next step")

    def test_parameters_keep_their_strides(self, world_size: int) -> None:
        bench = self.bench(world_size)
        bench.needs("params.strided")
        expected = {n: p.stride() for n, p in channels_last_convnet().named_parameters()}

        case = bench.case(channels_last_convnet)
        for strides in bench.run(jobs.strides_after, case, one_step("convnet")):
            wrong = [n for n in expected if strides[n] != expected[n]]
            assert not wrong, f"'params.strided' is provided, but strides changed: {wrong}"

    def test_the_model_can_be_deepcopied(self, world_size: int) -> None:
        bench = self.bench(world_size)
        bench.needs("params.deepcopy")
        by_rank = bench.run(jobs.deepcopied, bench.case("mlp"), one_step("mlp"))

        state = weights(assemble([kept for kept, _ in by_rank]))
        for _, copied in by_rank:
            what = "'params.deepcopy' is provided, but a deep copy of the model is not its weights"
            assert_same_state(copied, state, what=what)

    def test_a_closure_is_there_exactly_when_claimed(self, world_size: int) -> None:
        bench, step = self.bench(world_size), one_step("mlp")
        case, claimed = bench.case("mlp"), bench.provides("step.closure")
        for there in bench.run(jobs.has_closure, case):
            assert there == claimed, (
                f"step_closure is {'there' if there else 'None'} and 'step.closure' is "
                f"{'provided' if claimed else 'not provided'}: the two must agree"
            )
        if claimed:
            traces = bench.run(jobs.step_by_closure, case, step)
            bench.compare(traces, plain_gradients(case, step), "a step by closure")

    @pytest.mark.parametrize("token", ["grads.whole", "grads.elementwise"])
    def test_gradients_are_there_between_backward_and_step(
        self, world_size: int, token: str
    ) -> None:
        bench, step = self.bench(world_size), one_step("mlp")
        bench.needs(token)
        case = bench.case("mlp")
        expected = plain_gradients(case, step)

        for found in bench.run(jobs.gradients_between, case, step):
            check_shapes(found, expected, token)
            if token == "grads.whole":
                gradients = {n: gradient for n, (_, gradient) in found.items()}
                bench.compare_gradients(gradients, expected, f"{token!r} is provided, but .grad")

    def test_gradient_transforms_act_before_the_step(self, world_size: int) -> None:
        bench, step = self.bench(world_size), one_step("frozen")
        bench.needs("grads.stepped")
        case = bench.case("frozen")
        by_rank = bench.run(jobs.transform_gradients, case, step)

        trained = sorted(n for n, p in models.frozen_mlp().named_parameters() if p.requires_grad)
        for _, names in by_rank:
            assert sorted(names) == trained, (
                f"gradient transforms get every trainable parameter once a step, {trained}; got "
                f"{sorted(names)}"
            )
        doubled = {n: 2 * g for n, g in plain_gradients(case, step).items()}
        bench.compare([t for t, _ in by_rank], doubled, "a gradient transform that doubles")

    @pytest.mark.parametrize("token", ["params.may_freeze", "params.may_unfreeze"])
    def test_layers_change_sides_during_training(self, world_size: int, token: str) -> None:
        bench, model = self.bench(world_size), {"params.may_freeze": "mlp"}.get(token, "frozen")
        bench.needs(token, params_freeze_midrun=True)
        case = bench.case(model, params_freeze_midrun=True)
        steps = one_step(model, lr=0.0), one_step(model, seed=1)
        traces = bench.run(jobs.flip_trainable, case, steps, "0.")

        expected = replace(case, make_model=flipped(case.make_model, "0."))
        gradients = plain_gradients(expected, steps[1])
        bench.compare(traces, gradients, f"{token!r} is provided, but a step after the change")

    def test_ranks_may_skip_different_layers(self, world_size: int) -> None:
        bench, step = self.bench(world_size), one_step("mlp", branch_by_rank=True)
        bench.needs("graph.per_rank", graph_random=True)
        case = replace(bench.case("mlp", graph_random=True), make_model=models.Branching)
        traces = bench.run(jobs.train, case, [step])

        expected = plain_gradients(case, step, shares=world_size)
        bench.compare(traces, expected, "'graph.per_rank' is provided, but a step with it")
