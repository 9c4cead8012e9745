"""compile= and activation_checkpointing=: the same training, in place, or a reason why not."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from tests.core.trainings import arguments, fit, make_loader, make_model, make_trainer
from tests.core.unit_runs import Counting, Gpt, compare, different, make_text, train, trainer_of
from torchweld import ModelCheckpoint, Trainer
from torchweld.components import CheckpointingOptions, CompileOptions, Settings
from torchweld.errors import InvalidArgument, RunError
from torchweld.model.units import prepare_units, restore_units
from torchweld.setup.surroundings import recompile_limit
from torchweld.testing import empty_registry

pytestmark = [  # what torch 2.13 warns of in its own tracing
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]
CPU = torch.device("cpu")
BOTH: dict[str, Any] = {"compile": {}, "activation_checkpointing": True}
NOTHING: dict[str, Any] = {}
LAST: dict[str, Any] = {"barebones": False, "logger": False, "enable_progress_bar": False}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()


# ---- the same training ---------------------------------------------------------------------------


def test_training_is_bitwise_the_same_with_one_graph_for_all_units() -> None:
    limit = getattr(torch._dynamo.config, recompile_limit())

    alone, compiled, both = compare(
        "single", {}, [{"activation_checkpointing": True}, {"compile": {}}, BOTH]
    )

    # Training with whole and with short batches, and evaluation; three blocks share each of them.
    assert alone == ([], {}, 0)
    assert compiled == ([], {}, 3)
    assert both == ([], {}, 3)
    assert getattr(torch._dynamo.config, recompile_limit()) == limit


def test_own_loop_with_windows_is_bitwise_the_same() -> None:
    settings = {"own_loop": True, "accumulate_grad_batches": 2}

    assert compare("single", settings, [BOTH])[0][:2] == ([], {})


def test_bf16_is_the_same_bitwise_when_checkpointed() -> None:
    assert compare("single", {"precision": "bf16"}, [{"activation_checkpointing": True}]) == [
        ([], {}, 0)
    ]


@pytest.mark.parametrize("first", [{}, BOTH], ids=["plain first", "improved first"])
def test_a_run_goes_on_bitwise_without_or_with_them(first: dict[str, Any], tmp_path: Path) -> None:
    backend: dict[str, Any] = {"compile": {"backend": Counting()}, "activation_checkpointing": True}
    before, after = (backend, NOTHING) if first else (NOTHING, backend)
    whole, _ = train("single")

    train("single", max_epochs=1, **LAST, callbacks=ModelCheckpoint(), **before)
    resumed, _ = train("single", ckpt_path="last", **LAST, **after)

    assert different(whole, resumed) == []


@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")  # of torch 2.6 itself
def test_inductor_trains_as_eager_does_but_for_rounding() -> None:
    settings: dict[str, Any] = {"dropout": 0.0, "max_steps": 1, "validates": False}

    plain, _ = train("single", **settings)
    compiled, _ = train("single", compile=True, **settings)

    # Measured 2e-7 in the gradients; Adam's first step turns that into as much of its own size.
    assert plain.keys() == compiled.keys()
    assert all(torch.allclose(plain[n], compiled[n], rtol=1e-3, atol=1e-5) for n in plain)


class Block(nn.Module):
    """A layer of a model of several."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(width, width), nn.Dropout(0.2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.layer(inputs)))  # type: ignore[no-any-return]  # torch says Any


def train_two(**settings: Any) -> dict[str, Tensor]:
    """Two models in turn, each learning through the other one, which is frozen meanwhile."""
    torch.manual_seed(0)
    models = {name: nn.Sequential(Block(5), Block(5)) for name in ("first", "second")}
    rates = {name: partial(SGD, lr=0.1) for name in models}
    trainer = make_trainer(seed=0, **settings)
    with trainer.prepare(models, make_loader(), optimizer=rates) as run:
        for inputs, _ in run.batches():
            for name in run.models:
                with run.models[name].alone():
                    outputs = run.models["second"](run.models["first"](inputs))
                    run.models[name].backward((outputs - inputs).square().mean())
                run.models[name].step()
    return {f"{n}.{k}": v.clone() for n, m in models.items() for k, v in m.state_dict().items()}


def test_several_models_are_recomputed_bitwise_as_without() -> None:
    assert different(train_two(), train_two(activation_checkpointing=True)) == []


def test_several_models_compile_bitwise_or_are_refused_by_an_old_torch() -> None:
    backend = Counting()
    settings: dict[str, Any] = {"compile": {"backend": backend}}

    if TorchVersion(torch.__version__) < "2.13":
        with pytest.raises(InvalidArgument, match=r"loses gradients .* leave compile out"):
            train_two(**settings)
        assert None in gradients_of_models_frozen_in_turn()
        return

    assert different(train_two(), train_two(**settings)) == []
    assert backend.graphs > 0


def gradients_of_models_frozen_in_turn() -> list[Tensor | None]:
    """By hand, with nothing of torchweld: what the refusal is there for."""
    models = [nn.Sequential(Block(5), Block(5)) for _ in range(2)]
    for unit in (unit for model in models for unit in model):
        unit.compile(backend="aot_eager")
    found: list[Tensor | None] = []
    for trained in (*models, *models):
        for model in models:
            model.zero_grad()
            model.requires_grad_(model is trained)
        models[1](models[0](torch.ones(4, 5))).sum().backward()
        found += [parameter.grad for parameter in trained.parameters()]
    return found


# ---- in place ------------------------------------------------------------------------------------


def improved(model: nn.Module, **asked: Any) -> nn.Module:
    settings = Settings(
        compile=CompileOptions(backend="aot_eager") if asked.get("compile") else None,
        activation_checkpointing=CheckpointingOptions() if asked.get("again") else None,
    )
    prepare_units(model, [model], settings, CPU, trains=True)
    return model


def test_names_and_classes_stay_and_everything_can_be_taken_back() -> None:
    model, plain = Gpt(), Gpt()

    improved(model, compile=True, again=True)

    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    restore_units(model)
    assert all("forward" not in vars(m) for m in model.modules())
    assert all(m._compiled_call_impl is None for m in model.modules())


def test_a_second_trainer_without_them_takes_them_back() -> None:
    model, data = Gpt(), make_text()
    given: dict[str, Any] = {"loss": F.cross_entropy, "optimizer": partial(SGD, lr=0.1)}
    trainer_of("single", activation_checkpointing=True).fit(model, data, **given)

    trainer_of("single").fit(model, data, **given)

    assert all("forward" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_checkpointed_model_is_one_of_its_own(copied: Any) -> None:
    model = improved(Gpt(0.0), again=True)
    twin = copied(model)
    tokens = make_text().tensors[0]
    before = model(tokens)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    torch.testing.assert_close(twin(tokens), before)


class Normed(nn.Module):
    """A block with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(inputs)))


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Normed(), Normed(), nn.Linear(5, 3))


def test_running_statistics_count_each_batch_once() -> None:
    plain, model = normed(), normed()

    fit(plain, make_loader())
    fit(model, make_loader(), settings={"activation_checkpointing": True})

    assert different(plain.state_dict(), model.state_dict()) == []


def test_without_the_remedy_a_recomputation_counts_a_batch_twice() -> None:
    block = Normed()

    checkpoint(block, torch.randn(4, 5), use_reentrant=False).sum().backward()

    assert block.norm.num_batches_tracked == 2


# ---- refused, or said ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "model", "part"),
    [
        ({"activation_checkpointing": True}, make_model, "no repeated blocks"),
        ({"activation_checkpointing": {"every": 9}}, normed, "every=9 leaves out all 2 units"),
        ({"activation_checkpointing": {"units": "Nromed"}}, normed, "did you mean 'Normed'?"),
        ({"activation_checkpointing": True, "compile": True}, normed, "Normed has a BatchNorm1d"),
        ({"activation_checkpointing": True, "compile": {"backend": "eager"}}, Gpt, "'aot_eager'"),
        ({"compile": {"backend": "inducto"}}, make_model, "did you mean 'inductor'?"),
        ({"compile": {"mode": "fast"}}, make_model, "torch.compile refuses"),
        ({"compile": True}, lambda: torch.compile(make_model()), "is compiled already"),
        (
            {"activation_checkpointing": {"units": ("0", "2")}},
            lambda: nn.Sequential(
                nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 3)
            ),
            "spectral norm",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_before_step_1(
    settings: dict[str, Any], model: Any, part: str
) -> None:
    with pytest.raises(InvalidArgument) as error:
        fit(model(), make_loader(), settings=settings)

    assert part in str(error.value)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"compile": "yes"}, "compile='yes': give True, False, or a mapping"),
        ({"compile": {"mod": "default"}}, "did you mean 'mode'?"),
        ({"activation_checkpointing": {"every": 0}}, "every=0: give 1 for all units"),
        ({"deterministic": "yes"}, "give True, False or 'warn'"),
    ],
)
def test_a_wrong_option_is_an_error_of_the_trainer(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        make_trainer(**settings)

    assert part in str(error.value)


def test_a_missing_compiler_is_said_before_step_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)

    with pytest.raises(RunError, match=r"'g\+\+' that torch.compile needs"):
        fit(make_model(), make_loader(), settings={"compile": True})


def test_evaluation_alone_compiles_and_has_nothing_to_compute_again() -> None:
    counting, model = Counting(), Gpt(0.0)
    trainer = trainer_of("single", compile={"backend": counting}, activation_checkpointing=True)

    trainer.evaluate(model, make_text(), loss=F.cross_entropy)

    assert counting.graphs == 2  # whole batches, and the short one
    assert all("forward" not in vars(m) for m in model.modules())


def test_plan_prints_them_with_their_owner_and_they_are_in_the_digest() -> None:
    asked = {"compile": {"dynamic": True}, "activation_checkpointing": True}
    trainer = Trainer(strategy="single", registry=empty_registry(), **asked)  # type: ignore[arg-type]  # literals
    plain = Trainer(strategy="single", registry=empty_registry())

    text = trainer.plan.explain()

    assert (
        "core        checkpointing      per unit, in place\n"
        "            compile            per unit, in place   dynamic=True\n"
        "strategy    single"
    ) in text
    assert trainer.plan.digest != plain.plan.digest


# ---- deterministic -------------------------------------------------------------------------------


class Flags:
    """Notes what holds during a run."""

    def __init__(self) -> None:
        self.seen: tuple[bool, bool] | None = None

    def at(self, border: Any, run: Any) -> None:
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        self.seen = torch.are_deterministic_algorithms_enabled(), warns
        if "fit_end" in border.kind:
            raise KeyError("on purpose")


@pytest.mark.parametrize(("asked", "seen"), [(True, (True, False)), ("warn", (True, True))])
def test_deterministic_holds_during_the_run_and_not_after_it(asked: Any, seen: Any) -> None:
    flags, cudnn = Flags(), torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    quiet = {"barebones": False, "enable_checkpointing": False, "logger": False}

    with pytest.raises(KeyError):
        make_trainer(deterministic=asked, callbacks=flags, **quiet).fit(
            make_model(), make_loader(), **arguments()
        )

    assert flags.seen == seen
    assert not torch.are_deterministic_algorithms_enabled()
    assert (cudnn.deterministic, cudnn.benchmark) == before


class Scattering(nn.Module):
    """Uses an operation that torch has no deterministic form of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(inputs)
        index = torch.zeros(4, dtype=torch.long)
        return outputs.put(index, torch.zeros(4), accumulate=False)


def test_deterministic_refuses_an_operation_that_is_not() -> None:
    with pytest.raises(RuntimeError, match="deterministic"):
        fit(Scattering(), make_loader(), settings={"deterministic": True})


def test_sync_batchnorm_of_one_process_changes_nothing() -> None:
    plain, model = normed(), normed()

    fit(plain, make_loader())
    fit(model, make_loader(), settings={"sync_batchnorm": True})

    assert different(plain.state_dict(), model.state_dict()) == []
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
