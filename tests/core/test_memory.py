"""Memory is estimated before anything is built."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from torchweld.cli import main

MODELS = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 200))

def huge():
    return nn.Linear(10**6, 10**5)

def tied():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    model[1].weight = model[0].weight
    return model

def frozen():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    model[0].requires_grad_(False)
    return model

def looks_at_weights():
    model = small()
    model[0].weight.sum().item()
    return model

def needs_an_argument(width):
    return nn.Linear(width, width)

def returns_nothing():
    pass

def lazy():
    return nn.LazyLinear(3)

def imports_late():
    import torch._dynamo
    return small()

class Holder:
    make = staticmethod(small)

module = nn.Linear(3, 3)
number = 3

def slow_sgd(groups, lr=0.1):
    return torch.optim.SGD(groups, lr=lr, momentum=0.5)
"""
FLOATS = 64 * 1000 + 1000 + 1000 * 200 + 200


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module ``nets_here`` in the working directory, as a user has one."""
    (tmp_path / "nets_here.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets_here", raising=False)


def plan(*arguments: str, model: str = "nets_here:small", optimizer: str = "adamw") -> Result:
    words = ["plan", *arguments, "--model", model, "--optimizer", optimizer]
    return CliRunner().invoke(main, words)


def planned(*arguments: str, **more: str) -> dict[str, Any]:
    result = plan(*arguments, "--json", **more)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout)["memory"])


def test_plan_without_a_model_says_how_to_ask() -> None:
    lines = CliRunner().invoke(main, ["plan"]).output.splitlines()

    assert "memory            give --model pkg:make --optimizer adamw" in lines


@pytest.mark.usefixtures("nets")
def test_plan_shows_a_line_for_each_kind_and_the_sum() -> None:
    output = plan("strategy=ddp", "--world-size", "2").output

    assert [" ".join(line.split()) for line in output.partition("memory")[2].splitlines()] == [
        "each of 2 processes: nets_here:small (0.27 M parameters), adamw (2 tensors each)",
        "parameters 1.1 MB",
        "gradients 1.1 MB",
        "optimizer state 2.1 MB",
        "sum 4.2 MB",
        "activations and buffers come on top",
    ]


@pytest.mark.usefixtures("nets")
def test_plan_as_json_has_the_bytes() -> None:
    memory = planned("strategy=single", "--world-size", "1")

    sizes = {"parameters": 4 * FLOATS, "gradients": 4 * FLOATS, "optimizer": 8 * FLOATS}
    assert memory == {
        "model": "nets_here:small",
        "num_parameters": FLOATS,
        "optimizer": "adamw",
        "optimizer_slots": 2,
        "world_size": 1,
        "num_bytes": sizes,
        "sum_bytes": 16 * FLOATS,
        "note": "",
        "units": "",
    }


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(
    ("optimizer", "slots"),
    [
        ("sgd", 0),
        ("sgd:momentum=0.9", 1),
        ("Adam", 2),
        ("adam:amsgrad=true", 3),
        ("rmsprop", 1),
        ("rmsprop:momentum=0.9:centered=true", 3),
        ("adagrad", 1),
        ("torch.optim:AdamW", 2),
        ("torch.optim:SGD:momentum=0.9:lr=1", 1),
        ("nets_here:slow_sgd", 1),
        ("nets_here:slow_sgd:lr=0.5", 1),
    ],
)
def test_slots_are_counted_in_a_step_of_the_optimizer(optimizer: str, slots: int) -> None:
    memory = planned(optimizer=optimizer)

    assert memory["optimizer_slots"] == slots
    assert memory["num_bytes"]["optimizer"] == slots * 4 * FLOATS


@pytest.mark.usefixtures("nets")
def test_a_model_that_no_machine_could_hold_is_estimated() -> None:
    memory = planned(model="nets_here:huge")

    assert memory["num_bytes"]["parameters"] == 4 * (10**11 + 10**5)


@pytest.mark.usefixtures("nets")
def test_tied_weights_count_once() -> None:
    assert planned(model="nets_here:tied")["num_parameters"] == 100 * 100 + 2 * 100


@pytest.mark.usefixtures("nets")
def test_frozen_parameters_have_no_gradient_and_no_state() -> None:
    sizes = planned(model="nets_here:frozen")["num_bytes"]

    half = 4 * (100 * 100 + 100)
    assert sizes == {"parameters": 2 * half, "gradients": half, "optimizer": 2 * half}


@pytest.mark.usefixtures("nets")
def test_true_bf16_halves_everything() -> None:
    sum_bytes = planned("precision=bf16-true")["sum_bytes"]

    assert sum_bytes == 8 * FLOATS
    assert planned("precision=bf16")["sum_bytes"] == 16 * FLOATS


@pytest.mark.usefixtures("nets")
def test_a_constructor_that_reads_its_weights_is_built_on_the_cpu_and_this_is_said() -> None:
    memory = planned(model="nets_here:looks_at_weights")

    assert memory["num_bytes"]["parameters"] == 4 * FLOATS
    assert memory["note"].startswith("built on the CPU; on the meta device RuntimeError")
    assert "built on the CPU" in plan(model="nets_here:looks_at_weights").output


@pytest.mark.usefixtures("nets")
def test_a_module_and_an_attribute_of_a_class_will_do() -> None:
    assert planned(model="nets_here:module")["num_parameters"] == 12
    assert planned(model="nets_here:Holder.make")["num_parameters"] == FLOATS


@pytest.mark.usefixtures("nets")
def test_a_constructor_may_import_what_cannot_be_imported_on_the_meta_device() -> None:
    words = ["plan", "--model", "nets_here:imports_late", "--optimizer", "sgd", "--json"]
    program = f"from torchweld.cli import main; main({words!r})"

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert json.loads(done.stdout)["memory"]["note"] == "", done.stderr


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nets_here:needs_an_argument", "built neither on the meta device (TypeError"),
        ("nets_here:returns_nothing", "returned NoneType, not an nn.Module"),
        ("nets_here:lazy", "'weight' is lazy and has no shape yet"),
        ("nets_here:number", "is a int: name an nn.Module"),
        ("nets_here:nothing", "has no attribute 'nothing'"),
        ("nets_nowhere:make", "No module named 'nets_nowhere'"),
        ("nets_here", "write module:object"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_sentence(model: str, said: str) -> None:
    result = plan(model=model)

    assert result.exit_code == 2
    assert said in result.output.splitlines()[-1]


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ("adamm", "did you mean 'adam'?"),
        ("adam:lrr=1", "unexpected keyword argument 'lrr'"),
        ("adam:lr=1:betas", "'betas' is no option=value"),
        ("lbfgs", "LBFGS keeps something else"),
        ("nets_here:nothing", "has no attribute 'nothing'"),
        ("nets_here:small", "cannot be made"),
    ],
)
def test_an_optimizer_that_cannot_be_had_is_one_sentence(optimizer: str, said: str) -> None:
    result = plan(optimizer=optimizer)

    assert result.exit_code == 2
    assert said in result.output.splitlines()[-1]


@pytest.mark.parametrize("option", ["--model=nets_here:small", "--optimizer=adamw"])
def test_model_and_optimizer_come_together(option: str) -> None:
    result = CliRunner().invoke(main, ["plan", option])

    assert result.exit_code == 2
    assert "--model and --optimizer together" in result.output


@pytest.mark.usefixtures("nets")
def test_a_plan_with_errors_has_no_estimate() -> None:
    result = plan("strategy=ddq", "--json")

    assert result.exit_code == 1
    assert "memory" not in json.loads(result.stdout)


@pytest.mark.usefixtures("nets")
def test_the_working_directory_is_searched_for_the_model_only() -> None:
    before = list(sys.path)

    plan()

    assert sys.path == before
