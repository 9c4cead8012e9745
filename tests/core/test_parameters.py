"""Which parameters are trained, with which settings: by hand it would be the same, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from tests.core.trainings import (
    SGD_FACTORY,
    M,
    arguments,
    assert_same,
    different,
    fit,
    make_data,
    make_loader,
    make_model,
    make_net,
    make_trainer,
    of_dataset,
    train_by_hand,
    weights,
)
from torchweld.errors import InvalidArgument, RunError
from torchweld.interfaces import Border, Run
from torchweld.testing import run_ranks

# ---- optimizers that the user gives --------------------------------------------------------------


def with_state(model: nn.Module) -> Optimizer:
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return optimizer


def several_groups(model: nn.Module) -> Optimizer:
    first, *rest = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": rest, "lr": 0.01}]
    return SGD(groups, lr=0.1)


def a_subset(model: nn.Module) -> Optimizer:
    return SGD(list(model.parameters())[:2], lr=0.1)


def more_than_the_model(model: nn.Module) -> Optimizer:
    parameters: list[Tensor] = [*model.parameters(), nn.Parameter(torch.ones(3))]
    return SGD(parameters, lr=0.1)


def another_models(model: nn.Module) -> Optimizer:
    return SGD(make_model().parameters(), lr=0.1)


INSTANCES: dict[Callable[[nn.Module], Optimizer], str] = {
    with_state: "already made steps.*functools.partial",
    several_groups: "2 parameter groups.*param_groups=rule",
    a_subset: "holds 2 of the model's 4 trainable parameters: freeze the others",
    more_than_the_model: "1 parameters that are not the model's and would not be trained",
    another_models: "4 parameters that are not the model's",
}


@pytest.mark.parametrize("make", INSTANCES)
def test_an_optimizer_instance_that_cannot_be_made_anew_is_refused(
    make: Callable[[nn.Module], Optimizer],
) -> None:
    model = make_model()

    with pytest.raises(InvalidArgument, match=INSTANCES[make]):
        fit(model, make_loader(), optimizer=make(model))


def test_an_instance_together_with_groups_is_refused() -> None:
    model = make_model()

    with pytest.raises(InvalidArgument, match="param_groups= was given too"):
        fit(model, make_loader(), optimizer=SGD(model.parameters()), param_groups=no_decay_on_norms)


def test_an_instance_with_a_frozen_rest_trains_what_it_holds() -> None:
    model, expected = make_model(), make_model()
    for each in (model, expected):
        each[0].requires_grad_(False)

    fit(model, make_loader(), optimizer=SGD(model[2].parameters(), lr=0.1, momentum=0.9))

    assert_same(model, train_by_hand(expected, [[b] for b in make_loader()]))


FACTORIES: dict[str, tuple[Any, str]] = {
    "of another model": (lambda _: SGD(make_model().parameters()), "TW503.*not the model's"),
    "of a part": (lambda groups: SGD(groups[0]["params"][:1]), "TW503.*in no group: 0.bias"),
    "of more": (
        lambda groups: SGD([*groups, {"params": [nn.Parameter(torch.ones(1))]}]),
        "TW503.*1 parameters that are not the model's",
    ),
    "without groups": (
        lambda groups: SGD([p for group in groups for p in group["params"]]),
        "TW503.*weight' and '.*bias' in one group, though param_groups=",
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory_that_ignores_its_groups_is_refused(name: str) -> None:
    factory, words = FACTORIES[name]

    with pytest.raises(RunError, match=words):
        fit(make_model(), make_loader(), optimizer=factory, param_groups=no_decay_on_vectors)


def test_a_factory_may_split_its_groups_and_be_saved(tmp_path: Path) -> None:
    def split(groups: list[dict[str, Any]]) -> Optimizer:
        parameters = [p for group in groups for p in group["params"]]
        vectors = [p for p in parameters if p.ndim < 2]
        return SGD([{"params": [p for p in parameters if p.ndim > 1]}, {"params": vectors}], lr=0.1)

    settings = {"barebones": False, "logger": False, "default_root_dir": tmp_path}
    result = fit(make_model(), make_loader(), optimizer=split, settings=settings)

    assert result.checkpoint is not None


# ---- groups by rule ------------------------------------------------------------------------------


def no_decay_on_vectors(name: str, module: nn.Module, parameter: nn.Parameter) -> dict[str, float]:
    return {"weight_decay": 0.0 if parameter.ndim < 2 else 0.1}


def no_decay_on_norms(name: str, module: nn.Module, parameter: nn.Parameter) -> dict[str, float]:
    return {"weight_decay": 0.0} if isinstance(module, nn.BatchNorm1d) else {"weight_decay": 0.1}


def step_by_hand(model: nn.Module, optimizer: Optimizer, *, clip: Any = None) -> nn.Module:
    model.train()
    for inputs, targets in make_loader():
        F.cross_entropy(model(inputs), targets).backward()
        if clip is not None:
            clip(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_groups_by_rule_train_as_by_hand() -> None:
    model, expected = make_net(), make_net()
    norms = list(expected[1].parameters())
    rest = [p for p in expected.parameters() if all(p is not norm for norm in norms)]
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]

    torch.manual_seed(2)
    fit(model, make_loader(), optimizer=partial(AdamW, lr=0.1), param_groups=no_decay_on_norms)

    torch.manual_seed(2)
    assert_same(model, step_by_hand(expected, AdamW(groups, lr=0.1)))


def test_a_misspelt_hyper_parameter_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"'weigth_decay'.*did you mean 'weight_decay'\?"):
        fit(make_model(), make_loader(), param_groups=lambda *_: {"weigth_decay": 0.0})


def test_learning_rates_of_groups_are_logged() -> None:
    def slower(name: str, module: nn.Module, parameter: nn.Parameter) -> dict[str, float]:
        return {"lr": 0.01} if name.startswith("0.") else {}

    result = fit(make_model(), make_loader(), param_groups=slower)

    assert (result.metrics["lr"], result.metrics["lr/1"]) == (0.01, 0.1)


# ---- clipping, closures, gradients ---------------------------------------------------------------

CLIPS: dict[str, Callable[..., Any]] = {
    "norm": partial(nn.utils.clip_grad_norm_, max_norm=0.05),
    "value": partial(nn.utils.clip_grad_value_, clip_value=0.05),
}


@pytest.mark.parametrize("algorithm", CLIPS)
def test_clipping_is_as_by_hand(algorithm: str) -> None:
    model, expected = make_model(), make_model()
    settings = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}

    result = fit(model, make_loader(), settings=settings)

    by_hand = step_by_hand(expected, SGD_FACTORY(expected.parameters()), clip=CLIPS[algorithm])
    assert_same(model, by_hand)
    assert ("grad_norm" in result.metrics) == (algorithm == "norm")


def test_the_gradient_norm_is_that_before_clipping() -> None:
    model, expected = make_model(), make_model()
    inputs, targets = next(iter(make_loader()))
    F.cross_entropy(expected(inputs), targets).backward()
    norm = torch.cat([p.grad.flatten() for p in expected.parameters() if p.grad is not None]).norm()

    result = fit(model, make_loader(), settings={"max_steps": 1, "gradient_clip_val": 0.01})

    assert result.metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_evaluates_the_loss_as_by_hand(search: str | None) -> None:
    make = partial(LBFGS, lr=0.5, max_iter=4, line_search_fn=search)
    model, expected = make_model(), make_model()
    optimizer = make(expected.parameters())
    for inputs, targets in make_loader(22):

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(expected(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)

    fit(model, make_loader(22), optimizer=make)

    assert_same(model, expected)


def lbfgs_case(search: str | None, world_size: int) -> tuple[dict[str, Tensor], float]:
    model = make_model()
    settings = {
        "strategy": "ddp" if world_size > 1 else "single",
        "data": of_dataset(8 // world_size),
        "seed": 3,
    }
    make = partial(LBFGS, lr=0.5, max_iter=4, line_search_fn=search)
    result = fit(model, make_data(21), optimizer=make, settings=settings)
    return weights(model), result.metrics["train_loss"]


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_searches_alike_on_two_processes(search: str | None) -> None:
    expected, loss = lbfgs_case(search, 1)

    results = run_ranks(lbfgs_case, 2, search, 2)

    assert different(results[0][0], results[1][0]) == []
    # A sum in another order, and the steps of a search that amplifies it.
    torch.testing.assert_close(results[0][0], expected, rtol=1e-3, atol=1e-3)
    assert results[0][1] == pytest.approx(loss, rel=1e-4)


def test_gradients_from_before_do_not_reach_the_first_step() -> None:
    model = make_model()
    model(torch.ones(2, 5)).sum().backward()

    fit(model, make_loader())

    assert_same(model, train_by_hand(make_model(), [[b] for b in make_loader()]))


# ---- tied and frozen parameters ------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers share one weight; a buffer is in no state_dict."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.full((), 2.0), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.second(torch.tanh(self.first(inputs)))
        return self.last(hidden)  # type: ignore[no-any-return]  # a module


def test_tied_weights_stay_tied_and_train_once() -> None:
    model = Tied()

    fit(model, make_loader())

    assert model.second.weight is model.first.weight
    assert_same(model, train_by_hand(Tied(), [[b] for b in make_loader()]))


def test_frozen_parameters_stay_and_a_group_of_them_is_left_out() -> None:
    def freeze(model: nn.Sequential) -> nn.Sequential:
        model[0].requires_grad_(False)
        return model

    model = freeze(make_model())

    fit(model, make_loader(), param_groups=frozen_apart)

    assert_same(model, train_by_hand(freeze(make_model()), [[b] for b in make_loader()]))
    assert torch.equal(model[0].weight, make_model()[0].weight)


def frozen_apart(name: str, module: nn.Module, parameter: nn.Parameter) -> dict[str, float]:
    return {} if parameter.requires_grad else {"lr": 7.0}


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(RunError, match="no trainable parameter"):
        fit(make_model().requires_grad_(False), make_loader())


class Switches:
    """Freezes or unfreezes the first layer after step 2."""

    def __init__(self, trainable: bool) -> None:
        self.trainable = trainable

    def next_due(self, progress: Any) -> int:
        return int(progress.step) + 1

    def at(self, border: Border, run: Run) -> None:
        if border.progress.step == 2:
            for name, parameter in run.model.named_parameters():
                if name.startswith("0."):
                    parameter.requires_grad_(self.trainable)


def switched(trainable: bool, options: dict[str, Any]) -> str:
    model = make_model()
    model[0].requires_grad_(not trainable)
    settings = {
        "strategy": options.get("strategy", "ddp"),
        "data": of_dataset(),
        "barebones": False,
        "enable_checkpointing": False,
        "logger": False,
        "enable_progress_bar": False,
        "callbacks": [Switches(trainable)],
    }
    try:
        fit(model, make_data(40), settings=settings)
    except RunError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(("trainable", "verb"), [(True, "became trainable"), (False, "was frozen")])
def test_what_is_trained_cannot_change_under_ddp(trainable: bool, verb: str) -> None:
    answers = run_ranks(switched, 2, trainable, {})

    assert all(f"'0.weight' {verb} during the run" in answer for answer in answers), answers


@pytest.mark.parametrize("trainable", [True, False])
def test_what_is_trained_can_change_in_one_process(trainable: bool) -> None:
    assert switched(trainable, {"strategy": "single"}) == "trained"


# ---- weights to start from -----------------------------------------------------------------------


def on_meta(make: Callable[[], M]) -> M:
    with torch.device("meta"):
        return make()


def test_a_model_on_meta_needs_weights() -> None:
    with pytest.raises(RunError, match=r"'0.weight' is on the meta device.*init_weights="):
        fit(on_meta(make_model), make_loader())


def test_a_buffer_on_meta_is_refused_like_a_parameter() -> None:
    model = make_net()
    model[1].running_mean = torch.zeros(16, device="meta")

    with pytest.raises(RunError, match=r"'1.running_mean' is on the meta device"):
        fit(model, make_loader())


def test_a_lazy_model_is_refused() -> None:
    with pytest.raises(RunError, match=r"'0.weight' is lazy.*one batch through the model"):
        fit(nn.Sequential(nn.LazyLinear(3)), make_loader())


@pytest.mark.parametrize("kind", ["mapping", "file"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_to_start_from_are_trained_on(kind: str, device: str, tmp_path: Path) -> None:
    source: Any = make_net().state_dict()
    if kind == "file":
        save_file(source, tmp_path / "net.safetensors")
        source = tmp_path / "net.safetensors"
    model = on_meta(make_net) if device == "meta" else make_net().apply(zero)
    expected = make_net()

    torch.manual_seed(9)
    fit(model, make_loader(), init_weights=source)

    torch.manual_seed(9)
    assert_same(model, train_by_hand(expected, [[b] for b in make_loader()]))


def zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def test_tied_weights_on_meta_are_filled_once_and_stay_tied() -> None:
    class Shared(Tied):
        def __init__(self) -> None:
            super().__init__()
            del self.scale

    model = on_meta(Shared)

    fit(model, make_loader(), init_weights=Shared().state_dict())

    assert model.second.weight is model.first.weight
    assert_same(model, train_by_hand(Shared(), [[b] for b in make_loader()]))


def test_a_buffer_that_no_file_can_fill_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="buffer 'scale' is on the meta device"):
        fit(on_meta(Tied), make_loader(), init_weights=Tied().state_dict())


def test_what_has_values_already_keeps_them_beside_meta() -> None:
    model = Tied()
    model.last = on_meta(lambda: nn.Linear(5, 3))

    fit(model, make_loader(), init_weights=Tied().state_dict())

    assert torch.equal(model.scale, torch.tensor(2.0))


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda given: given.pop("0.bias"), r"missing \['0.bias'\]"),
    "too many": (lambda given: given.update(more=torch.ones(1)), r"not in the model \['more'\]"),
    "shape": (
        lambda given: given.update({"0.bias": torch.ones(9)}),
        r"'0.bias' is \(9,\), not \(8,\)",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_do_not_fit_are_refused_by_name(name: str) -> None:
    change, words = MISFITS[name]
    given = dict(make_model().state_dict())
    change(given)

    with pytest.raises(InvalidArgument, match=f"neither before nor after surgery: .*{words}"):
        fit(make_model(), make_loader(), init_weights=given)


def put_into(parts: Any) -> Any:
    parts.model[0] = nn.Sequential(parts.model[0])
    return parts


@pytest.mark.parametrize("names", ["before", "after"])
def test_weights_may_have_the_names_before_or_after_surgery(names: str) -> None:
    prefix = "0." if names == "before" else "0.0."
    source = {n.replace("0.", prefix, 1): w for n, w in make_model().state_dict().items()}
    model = make_model().apply(zero)

    fit(model, make_loader(), init_weights=source, settings={"surgery": [put_into]})

    expected = train_by_hand(make_model(), [[b] for b in make_loader()])
    assert_same(model[2], expected[2])


def test_a_function_builds_the_model() -> None:
    trainer = make_trainer()

    trainer.fit(make_model, make_loader(), **arguments())

    loss = trainer.evaluate(data=make_loader())["loss"]
    expected = train_by_hand(make_model(), [[b] for b in make_loader()])
    inputs, targets = make_data().tensors
    assert loss == pytest.approx(F.cross_entropy(expected.eval()(inputs), targets).item(), rel=1e-6)
