"""A recipe is read whole, its mistakes are told together, and it trains what a script would."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset

from torchweld import ModelCheckpoint, Trainer, Use, use
from torchweld.cli import main
from torchweld.cli.recipe import Named, Recipe, open_recipe, read_recipe, with_word
from torchweld.cli.recipe_objects import fit_arguments, trainer_arguments
from torchweld.errors import InvalidArgument

PIECES = """
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    def load(count: int = 64):
        draw = torch.Generator().manual_seed(0)
        return TensorDataset(torch.randn(count, 4, generator=draw), torch.arange(count) % 3)

    def make(width: int, *, bias: bool = True):
        return nn.Sequential(nn.Linear(4, width, bias), nn.ReLU(), nn.Linear(width, 3))

    def pairs(samples):
        return torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples])

    def add_nothing(parts):
        return parts

    def accuracy(outputs, targets):
        return (outputs.argmax(1) == targets).sum(), len(targets)
    """
RECIPE = """
    model = { use = "pieces.py:make", width = 8 }
    loss = { use = "CrossEntropyLoss", label_smoothing = 0.1 }
    optimizer = { use = "sgd", lr = 0.1 }
    lr_scheduler = "CosineAnnealingLR"
    train = "pieces.py:load"
    metrics.accuracy = "pieces.py:accuracy"
    export = "weights.safetensors"

    [val]
    few = { use = "pieces.py:load", count = 8 }
    many = "pieces.py:load"

    [trainer]
    data = { use = "torch", batch_size = 16 }
    callbacks = [{ use = "ModelCheckpoint", every_n_train_steps = 2 }]
    logger = false
    max_epochs = 2
    seed = 3
    """


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with the file that it names; the working directory is another one."""
    folder, work = tmp_path / "recipes", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    (folder / "pieces.py").write_text(dedent(PIECES))
    (folder / "recipe.toml").write_text(dedent(RECIPE))
    monkeypatch.chdir(work)
    return folder / "recipe.toml"


def train(*words: object) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, words)])


# ---- reading: nothing is imported ----------------------------------------------------------------


def test_a_recipe_is_read_into_plain_data() -> None:
    data: dict[str, Any] = {
        "model": "net:Net",
        "optimizer": {"use": "SGD", "lr": 0.1},
        "train": "net:train",
        "metrics": {"accuracy": "net:accuracy"},
        "hparams": {"width": 3},
        "export": "w.safetensors",
        "trainer": {
            "data": {"use": "torch", "batch_size": 4},
            "surgery": ["a", {"use": "b", "x": 1}, "c:y=2,d"],
            "callbacks": ["net:Callback"],
            "max_epochs": 2,
        },
    }

    assert read_recipe(data, Path("here")) == Recipe(
        Path("here"),
        {
            "model": Named("model", "net:Net"),
            "optimizer": Named("optimizer", "SGD", {"lr": 0.1}),
            "train": Named("train", "net:train"),
            "metrics": {"accuracy": Named("metrics.accuracy", "net:accuracy")},
            "hparams": {"width": 3},
        },
        {
            "data": Use("torch", {"batch_size": 4}),
            "surgery": ["a", Use("b", {"x": 1}), Use("c", {"y": 2}), "d"],
            "callbacks": [Named("trainer.callbacks[0]", "net:Callback")],
            "max_epochs": 2,
        },
        "w.safetensors",
    )


def test_all_mistakes_of_a_recipe_are_told_at_once() -> None:
    data = {"modle": "a:b", "loss": 3, "datasets": "a:b", "val": "a:b", "trainer": {"data": 1}}

    with pytest.raises(InvalidArgument) as raised:
        read_recipe(data, Path())

    told = str(raised.value)
    for words in (
        "there is no key 'modle': did you mean 'model'?",
        "model is missing",
        "optimizer is missing",
        "datasets gives train and val",
        "loss = 3 names no object",
        "trainer.data = 1 names no component",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a=1", {"a": 1, "t": {"x": "y"}, "o": "sgd", "l": [1]}),
        ("t.x=true", {"t": {"x": True}, "o": "sgd", "l": [1]}),
        ("t.z.w=a b", {"t": {"x": "y", "z": {"w": "a b"}}, "o": "sgd", "l": [1]}),
        ("o.lr=1e-3", {"t": {"x": "y"}, "o": {"use": "sgd", "lr": 1e-3}, "l": [1]}),
    ],
)
def test_a_word_replaces_one_value(word: str, expected: dict[str, object]) -> None:
    assert with_word({"t": {"x": "y"}, "o": "sgd", "l": [1]}, word) == expected


@pytest.mark.parametrize("word", ["a", "=1", "l.x=1", "a="])
def test_a_word_that_replaces_nothing_is_refused(word: str) -> None:
    with pytest.raises(InvalidArgument):
        with_word({"l": [1]}, word)


# ---- objects -------------------------------------------------------------------------------------


def test_objects_are_what_a_script_would_give(recipe: Path) -> None:
    read = open_recipe(recipe, ["trainer.gradient_clip_val=1"])

    fit, settings = fit_arguments(read), trainer_arguments(read)

    assert isinstance(fit["loss"], nn.CrossEntropyLoss)
    assert fit["loss"].label_smoothing == 0.1
    assert fit["model"]()[0].out_features == 8
    assert {name: len(data) for name, data in fit["val"].items()} == {"few": 8, "many": 64}
    optimizer = fit["optimizer"]([nn.Parameter(torch.ones(1))])
    assert isinstance(optimizer, SGD)
    schedule = fit["lr_scheduler"](optimizer, 40)
    assert isinstance(schedule, CosineAnnealingLR)
    assert schedule.T_max == 40
    assert isinstance(settings["callbacks"][0], ModelCheckpoint)
    assert settings["gradient_clip_val"] == 1.0
    assert isinstance(settings["gradient_clip_val"], float)


def test_a_schedule_may_say_when_it_is_stepped(recipe: Path) -> None:
    words = ["lr_scheduler=MultiStepLR", "lr_scheduler.milestones=[2,3]"]
    read = open_recipe(recipe, [*words, "lr_scheduler.interval=epoch"])

    schedule = fit_arguments(read)["lr_scheduler"]

    made = schedule.factory(SGD([nn.Parameter(torch.ones(1))], lr=1.0), 4)
    assert schedule.interval == "epoch"
    assert dict(made.milestones) == {2: 1, 3: 1}


def test_one_cycle_may_be_given_epochs_and_their_steps(recipe: Path) -> None:
    words = ["lr_scheduler=OneCycleLR", "lr_scheduler.max_lr=1.0", "lr_scheduler.epochs=2"]
    read = open_recipe(recipe, [*words, "lr_scheduler.steps_per_epoch=3"])

    made = fit_arguments(read)["lr_scheduler"](SGD([nn.Parameter(torch.ones(1))], lr=1.0), 40)

    assert made.total_steps == 6


@pytest.mark.parametrize("word", ["steps_per_epoch=3", "total_steps=9"])
def test_a_length_that_torch_would_not_read_is_refused(word: str, recipe: Path) -> None:
    words = ["lr_scheduler=OneCycleLR", "lr_scheduler.max_lr=1.0", f"lr_scheduler.{word}"]
    given = [*words, "lr_scheduler.epochs=2"] if "total" in word else words

    with pytest.raises(InvalidArgument, match="would not be read beside total_steps"):
        fit_arguments(open_recipe(recipe, given))


def test_components_and_their_options_may_be_objects(recipe: Path) -> None:
    text = recipe.read_text().replace(
        "batch_size = 16 }", 'batch_size = 16, collate_fn = { use = "pieces.py:pairs" } }'
    )
    recipe.write_text(text + 'surgery = [{ use = "pieces.py:add_nothing" }]\n')

    settings = trainer_arguments(open_recipe(recipe))

    assert settings["data"].options["collate_fn"].__name__ == "pairs"
    assert settings["surgery"][0].name.__name__ == "add_nothing"
    assert train(recipe, "--set", "trainer.max_epochs=1").exit_code == 0


def test_an_argument_may_be_an_object_with_arguments(recipe: Path) -> None:
    text = recipe.read_text().replace(
        "label_smoothing = 0.1", 'weight = { use = "torch:ones", size = [3] }'
    )
    recipe.write_text(text)

    shown = train(recipe, "--dry-run")

    assert "CrossEntropyLoss(weight=torch:ones(size=[3]))" in shown.output


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("optimizer.learning_rate=1", "optimizer has no option 'learning_rate'"),
        ("optimizer.momentun=1", "did you mean 'momentum'?"),
        ("optimizer=sdg", "optimizer = 'sdg': there is no such name; did you mean 'SGD'?"),
        ("model.width=wide", "model cannot take width='wide': width is int, not str"),
        ("model=pieces.py:mak", "has no 'mak'; did you mean 'make'?"),
        ("model=piece.py:make", "there is no file"),
        ("model=no_module:make", "No module named 'no_module'"),
        ("model=make", 'write "module:object" or "file.py:object"'),
        ("trainer.max_epoch=1", "did you mean 'max_epochs'?"),
        ("trainer.max_epochs=two", "trainer cannot take max_epochs='two'"),
        ("trainer.data.batchsize=1", "did you mean 'batch_size'?"),
        ("max_epochs=1", "arguments of Trainer belong into the table [trainer]"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(word: str, told: str, recipe: Path) -> None:
    for options in ([], ["--dry-run"]):
        ended = train(recipe, "--set", word, *options)

        assert ended.exit_code in {1, 2}
        assert told in " ".join(ended.output.split())
    assert list(Path().iterdir()) == []


# ---- the command ---------------------------------------------------------------------------------


def test_a_dry_run_shows_objects_and_plan_and_starts_nothing(recipe: Path) -> None:
    shown = train(recipe, "--dry-run", "--set", "trainer.precision=bf16")

    assert shown.exit_code == 0
    assert "model                 pieces.py:make(width=8)" in shown.output
    assert "val.few               pieces.py:load(count=8)" in shown.output
    assert "ModelCheckpoint(every_n_train_steps=2)" in shown.output
    assert "precision bf16" in shown.output
    assert list(Path().iterdir()) == []


def test_a_recipe_ends_with_the_weights_of_the_script(recipe: Path) -> None:
    ended = train(recipe)
    draw = torch.Generator().manual_seed(0)
    samples = TensorDataset(torch.randn(64, 4, generator=draw), torch.arange(64) % 3)
    script = Trainer(data=use("torch", batch_size=16), max_epochs=2, seed=3, barebones=True)
    script.fit(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        samples,
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        optimizer=partial(SGD, lr=0.1),
        lr_scheduler=CosineAnnealingLR,
    )
    expected = load_file(script.export("expected.safetensors"))

    trained = load_file("weights.safetensors")
    assert ended.exit_code == 0
    assert "step 8" in ended.output
    assert "val_accuracy/few" in ended.output
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], value) for name, value in expected.items())


def test_a_recipe_goes_on_from_the_last_checkpoint(recipe: Path) -> None:
    train(recipe)
    whole = load_file("weights.safetensors")
    Path("weights.safetensors").unlink()
    newest = next(Path("runs").glob("*/step-8"))
    shutil.rmtree(newest)

    train(recipe, "--set", "ckpt_path=last")

    assert all(torch.equal(v, whole[n]) for n, v in load_file("weights.safetensors").items())


def test_the_recipe_of_the_documentation_is_the_one_of_the_examples() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "launching.md").read_text("utf-8")
    example = (root / "examples" / "recipes" / "digits.toml").read_text("utf-8")

    assert f"```toml\n{example.partition('.accuracy')[0].partition(chr(10) * 2)[2]}" in page
