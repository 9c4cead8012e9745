"""A resumed run ends where the undisturbed one would have ended, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from tests.core.forking import forked_ranks
from tests.core.small_runs import (
    DATA,
    OPTIMIZERS,
    SEED,
    Noisy,
    different,
    every_step,
    fit,
    forget,
    left_over,
    make_data,
    make_images,
    make_model,
    make_net,
    milestones,
    quiet_trainer,
    saved,
    weights,
)
from torchweld import use
from torchweld.callbacks import ModelCheckpoint
from torchweld.errors import CheckpointDamaged, CheckpointError, InvalidArgument
from torchweld.interfaces import Border, Run
from torchweld.testing import run_ranks

VARIANTS: dict[str, dict[str, Any]] = {
    "momentum": {},
    "adamw": {"optimizer": "adamw"},
    "lbfgs": {"optimizer": "lbfgs"},
    "accumulating": {"accumulate_grad_batches": 4, "data": "even own generator"},
    "clipping": {"gradient_clip_val": 0.1},
    "autocast": {"precision": "bf16"},
    "stateful callback": {"callbacks": Noisy},
    "limited": {"limit_train_batches": 4, "data": "even own generator"},
}
FIT_WORDS = ("data", "optimizer", "scheduler")

needs_composer = pytest.mark.skipif(
    importlib.util.find_spec("torchweld_composer") is None, reason="needs torchweld-composer"
)


def run(root: Path, *, resume: Path | None = None, **variant: Any) -> dict[str, Tensor]:
    """One run of a variant, with a checkpoint after each step."""
    words = {key: variant.pop(key) for key in FIT_WORDS if key in variant}
    if words.get("data") == "stream":
        variant |= {"max_epochs": None, "max_steps": 14}
    extra = [variant.pop("callbacks")()] if "callbacks" in variant else []
    saver = every_step() if resume is None else ModelCheckpoint()
    trainer = quiet_trainer(root, callbacks=[*extra, saver], **variant)
    return fit(trainer, ckpt_path=resume, **words)[0]


def wrongly_resumed(root: Path, steps: list[int] | None = None, **variant: Any) -> list[str]:
    """The checkpoints of an undisturbed run from which resuming ends somewhere else."""
    forget()
    expected = run(root / "whole", **variant)
    wrong = []
    for checkpoint in saved(root / "whole"):
        if steps is None or int(checkpoint.name.split("-")[1]) in steps:
            forget()
            result = run(root / checkpoint.name, resume=checkpoint, **variant)
            wrong += [checkpoint.name] if different(expected, result) else []
    return wrong


# ---- one process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_at_any_step_ends_with_the_same_weights(variant: str, tmp_path: Path) -> None:
    first_epoch_and_its_end = [1, 2, 3, 4, 5, 6]

    assert wrongly_resumed(tmp_path, first_epoch_and_its_end, **VARIANTS[variant]) == []


@pytest.mark.parametrize("data", DATA)
def test_resuming_goes_on_with_the_same_samples_whatever_orders_them(
    data: str, tmp_path: Path
) -> None:
    in_each_epoch_and_between = [2, 6, 8]

    assert wrongly_resumed(tmp_path, in_each_epoch_and_between, data=data) == []


@pytest.mark.soak
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("seed", [SEED, None])
def test_resuming_any_data_in_any_variant(
    data: str, variant: str, seed: int | None, tmp_path: Path
) -> None:
    assert wrongly_resumed(tmp_path, **{**VARIANTS[variant], "data": data, "seed": seed}) == []


def test_resuming_without_a_seed_reads_the_rest_of_the_epoch_also_when_torch_is_seeded_anew(
    tmp_path: Path,
) -> None:
    torch.manual_seed(1)
    expected = run(tmp_path / "whole", seed=None)
    torch.manual_seed(2)

    result = run(tmp_path / "rest", resume=saved(tmp_path / "whole")[2], seed=None)

    assert different(expected, result) == []


def test_saving_changes_nothing(tmp_path: Path) -> None:
    expected, _ = fit(quiet_trainer(tmp_path / "rarely", callbacks=[ModelCheckpoint()]))

    assert different(expected, run(tmp_path / "often")) == []


def test_resuming_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole", data="even own generator")
    checkpoint = saved(tmp_path / "whole")[1]

    for number, step in enumerate([3, 5, 6, 9]):
        forget()
        place = tmp_path / f"part {number}"
        trainer = quiet_trainer(place, max_epochs=None, max_steps=step)
        fit(trainer, data="even own generator", ckpt_path=checkpoint)
        checkpoint = saved(place)[-1]
    result = run(tmp_path / "rest", resume=checkpoint, data="even own generator")

    assert different(expected, result) == []


def test_an_own_loop_resumes_where_it_saved(tmp_path: Path) -> None:
    def loop(place: str, *, save_at: int | None, resume: str | None) -> dict[str, Tensor]:
        model = make_model()
        trainer = quiet_trainer(tmp_path, callbacks=[ModelCheckpoint(every_n_epochs=None)])
        arguments: dict[str, Any] = {"loss": F.cross_entropy, "optimizer": partial(SGD, lr=0.1)}
        with trainer.prepare(model, DATA["dataset"](), ckpt_path=resume, **arguments) as run:
            for inputs, targets in run.batches():
                run.backward(run.loss(run.model(inputs), targets))
                run.step()
                if run.progress.step == save_at:
                    run.save()
                    break
            if save_at is None:
                return weights(model)
        return {}

    expected = loop("whole", save_at=None, resume=None)
    shutil.rmtree(tmp_path)
    loop("part", save_at=4, resume=None)
    forget()

    assert different(expected, loop("rest", save_at=None, resume="last")) == []


def test_a_finished_run_has_nothing_left_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(tmp_path)

    _, result = fit(quiet_trainer(tmp_path), model=(model := make_model()), ckpt_path="last")

    assert different(expected, weights(model)) == []
    assert result.progress.step == 12
    assert "nothing is left to do: 12 of 12 steps are done" in capsys.readouterr().out


def test_more_epochs_go_on_where_fewer_ended(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole", max_epochs=3)
    run(tmp_path / "part", max_epochs=2)

    result, _ = fit(quiet_trainer(tmp_path / "part", max_epochs=3), ckpt_path="last")

    assert different(expected, result) == []


# ---- damage --------------------------------------------------------------------------------------


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "flipped": _flip_a_bit,
    "removed": Path.unlink,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a run and its checkpoints; not to be changed."""
    root = tmp_path_factory.mktemp("finished")
    run(root, max_epochs=1)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of a root with a run of six steps, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "root"))


@pytest.mark.parametrize("name", ["00000.safetensors", "00000.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_last_names_a_damaged_checkpoint_and_takes_the_one_before(
    damage: str, name: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = saved(root)[-1]
    DAMAGES[damage](newest / name)

    fit(quiet_trainer(root, max_steps=7, max_epochs=None), ckpt_path="last")

    said = capsys.readouterr().out
    assert f"skipped {newest}: " in said
    assert f"resumed {newest.parent / 'step-5'} at step 5" in said


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_given_by_path_is_an_error_that_names_the_file(
    damage: str, root: Path
) -> None:
    checkpoint = saved(root)[2]
    DAMAGES[damage](checkpoint / "00000.safetensors")

    with pytest.raises(CheckpointDamaged, match=r"00000\.safetensors"):
        fit(quiet_trainer(root), ckpt_path=checkpoint)


def test_last_is_an_error_where_no_checkpoint_is_intact(root: Path) -> None:
    for checkpoint in saved(root):
        _flip_a_bit(checkpoint / "00000.safetensors")

    with pytest.raises(CheckpointError, match="no intact checkpoint of this model"):
        fit(quiet_trainer(root), ckpt_path="last")


def test_what_a_killed_write_left_is_not_taken(root: Path) -> None:
    newest = saved(root)[-1]
    newest.rename(newest.with_name(f".{newest.name}.part"))

    _, result = fit(quiet_trainer(root, max_steps=6, max_epochs=None), ckpt_path="last")

    assert result.progress.step == 6
    assert result.checkpoint is not None
    assert result.checkpoint.parent != newest.parent


class _Bomb:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize(
    "name", ["00000.safetensors", "00000.json", "manifest.json", "data.pkl", "archive/data.pkl"]
)
def test_a_pickle_in_the_place_of_any_file_is_not_executed(
    name: str, root: Path, tmp_path: Path
) -> None:
    for checkpoint in saved(root):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(pickle.dumps(_Bomb(tmp_path / "executed")))

    for ckpt_path in ("last", saved(root)[-1], saved(root)[-1] / name):
        with suppress(CheckpointError):
            fit(quiet_trainer(root), ckpt_path=ckpt_path)

    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("argument", ["ckpt_path", "init_weights"])
def test_a_torch_file_is_refused_and_not_executed(argument: str, tmp_path: Path) -> None:
    torch.save({"model": _Bomb(tmp_path / "executed")}, tmp_path / "weights.pt")

    given: dict[str, Any] = {argument: tmp_path / "weights.pt"}
    with pytest.raises((CheckpointError, ValueError), match=r"weights\.pt"):
        fit(quiet_trainer(tmp_path), **given)

    assert not (tmp_path / "executed").exists()


# ---- what cannot resume --------------------------------------------------------------------------


def test_another_model_is_refused_before_step_1(root: Path) -> None:
    other = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))

    with pytest.raises(CheckpointError, match="was made of another model"):
        fit(quiet_trainer(root), model=other, ckpt_path=saved(root)[-1])
    with pytest.raises(CheckpointError, match="no intact checkpoint of this model"):
        fit(quiet_trainer(root), model=other, ckpt_path="last")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer SGD, and this run has AdamW"),
        ({"scheduler": False}, "lr_scheduler MultiStepLR, and this run has none"),
    ],
    ids=["optimizer", "schedule"],
)
def test_the_state_of_another_class_is_refused_before_step_1(
    argument: Mapping[str, Any], message: str, root: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        fit(quiet_trainer(root), ckpt_path="last", **argument)


def test_the_state_of_another_schedule_is_refused_before_step_1(root: Path) -> None:
    trainer = quiet_trainer(root)

    with pytest.raises(CheckpointError, match="lr_scheduler MultiStepLR, and this run has StepLR"):
        trainer.fit(
            make_model(), make_data(), loss=F.cross_entropy, optimizer=partial(SGD, lr=0.1),
            lr_scheduler=lambda optimizer, _: StepLR(optimizer, 2), ckpt_path="last",
        )  # fmt: skip


def test_other_parameter_groups_are_refused_before_step_1(root: Path) -> None:
    def by_dimension(name: str, module: nn.Module, parameter: nn.Parameter) -> dict[str, Any]:
        return {"weight_decay": 0.1 if parameter.dim() > 1 else 0.0}

    with pytest.raises(CheckpointError, match="1 parameter groups and this run has 2"):
        fit(quiet_trainer(root), ckpt_path="last", param_groups=by_dimension)


def test_accumulation_that_does_not_divide_the_position_is_refused(root: Path) -> None:
    with pytest.raises(CheckpointError, match="no multiple of this run's window"):
        fit(quiet_trainer(root, accumulate_grad_batches=2), ckpt_path=saved(root)[2])


def test_a_missing_and_an_excess_state_of_a_component_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "with", callbacks=Noisy, max_epochs=1)
    run(tmp_path / "without", max_epochs=1)

    run(tmp_path / "a", resume=saved(tmp_path / "with")[3])
    assert "a state of 'callback Noisy', which this run does not have" in capsys.readouterr().out
    run(tmp_path / "b", resume=saved(tmp_path / "without")[3], callbacks=Noisy)
    assert "no state of 'callback Noisy': it begins anew" in capsys.readouterr().out


# ---- which ones are kept -------------------------------------------------------------------------


class Scripted:
    """A metric whose value at each validation is given; as a callback it turns the pages."""

    def __init__(self, *values: float) -> None:
        self._values = iter((*values, *values))
        self._value = 0.0

    def at(self, border: Border, run: Run) -> None:
        if "eval_start" in border.kind:
            self._value = next(self._values)

    def measure(self, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
        return self._value * len(targets), len(targets)


@pytest.mark.parametrize(("mode", "kept"), [("min", [12, 18, 24]), ("max", [6, 24])])
def test_the_best_and_the_newest_are_kept_and_best_is_found(
    mode: Literal["min", "max"],
    kept: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = Scripted(0.5, 0.2, 0.3, 0.4)
    keep = ModelCheckpoint(monitor="val_score", mode=mode, save_top_k=len(kept) - 1)
    arguments: dict[str, Any] = {"val": make_data(), "metrics": {"score": script.measure}}
    fit(quiet_trainer(tmp_path, callbacks=[script, keep], max_epochs=4), **arguments)
    steps = [int(path.name.split("-")[1]) for path in saved(tmp_path)]

    again = quiet_trainer(tmp_path, callbacks=[script, keep], max_steps=25, max_epochs=None)
    fit(again, ckpt_path="best", **arguments)

    assert steps == kept
    assert f"at step {kept[0]}, epoch" in capsys.readouterr().out


def test_best_without_a_monitor_says_what_to_give(root: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"ModelCheckpoint\(monitor='val_loss'\)"):
        fit(quiet_trainer(root), ckpt_path="best")


def test_a_checkpoint_callback_used_twice_saves_and_keeps_for_each_run(tmp_path: Path) -> None:
    callback = ModelCheckpoint(save_top_k=1)
    trainer = quiet_trainer(tmp_path, callbacks=callback)

    results = [fit(trainer)[1] for _ in range(2)]

    assert [path.name for path in saved(tmp_path)] == ["step-12", "step-12"]
    assert results[0].checkpoint != results[1].checkpoint
    assert left_over(tmp_path) == []


# ---- several ranks -------------------------------------------------------------------------------


def _wrong_under_ddp(root: str, variant: dict[str, Any]) -> list[str]:
    wrong = wrongly_resumed(Path(root), strategy="ddp", **variant)
    # From resuming on buffers are rank 0's on every rank; only with no step left is that seen.
    last = saved(Path(root) / "whole")[-1].name
    return [name for name in wrong if name != last or os.environ["RANK"] == "0"]


@pytest.mark.parametrize("variant", ["momentum", "adamw", "accumulating", "stateful callback"])
def test_two_ranks_resume_at_any_step_with_the_same_weights(variant: str, tmp_path: Path) -> None:
    results = run_ranks(_wrong_under_ddp, 2, str(tmp_path), VARIANTS[variant])

    assert results == [[], []]


class Recording(nn.Module):
    """Remembers which samples it was trained on, by their first number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layer = nn.Linear(6, 3)
        self.seen: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.seen += inputs[:, 0].tolist()
        out: Tensor = self.layer(inputs)
        return out


def _read(root: str, resume: Path | None, batch: int, data: str = "dataset") -> dict[str, Any]:
    model = Recording()
    strategy = "ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "single"
    source = use("torch", batch_size=batch)
    trainer = quiet_trainer(root, max_epochs=3, strategy=strategy, data=source)
    _, result = fit(trainer, model=model, scheduler=False, ckpt_path=resume, data=data)
    return {"weights": weights(model), "seen": model.seen, "epoch": result.progress.epoch}


@pytest.mark.parametrize("step", [2, 3], ids=["in an epoch", "at its end"])
@pytest.mark.parametrize(("world_size", "batch"), [(1, 8), (4, 2), (1, 4)])
def test_another_number_of_processes_reads_the_rest_of_every_epoch_once(
    step: int, world_size: int, batch: int, tmp_path: Path
) -> None:
    run_ranks(_read, 2, str(tmp_path / "whole"), None, 4)
    checkpoint = saved(tmp_path / "whole")[step - 1]

    ranks = run_ranks(_read, world_size, str(tmp_path / "rest"), checkpoint, batch)

    seen = [value for rank in ranks for value in rank["seen"]]
    everything = make_data().tensors[0][:, 0].tolist()
    counts = sorted(seen.count(value) for value in everything)
    assert counts == ([2] * 16 + [3] * 6 if step == 2 else [2] * 22)
    assert [rank["epoch"] for rank in ranks] == [3] * world_size
    assert all(different(ranks[0]["weights"], rank["weights"]) == [] for rank in ranks)


def test_one_process_resumes_on_two_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    _read(str(tmp_path / "whole"), None, 4)
    checkpoint = saved(tmp_path / "whole")[5]

    ranks = run_ranks(_read, 2, str(tmp_path / "rest"), checkpoint, 4)

    assert sum(len(rank["seen"]) for rank in ranks) == 2 * 22
    assert [rank["epoch"] for rank in ranks] == [3, 3]


def test_a_position_that_another_number_of_processes_cannot_take_is_refused(tmp_path: Path) -> None:
    run_ranks(_read, 2, str(tmp_path / "whole"), None, 4)
    checkpoint = saved(tmp_path / "whole")[0]

    with pytest.raises(CheckpointError, match=r"1 batches of 4 on each of 2 processes.*1 x 5 on 1"):
        _read(str(tmp_path / "rest"), checkpoint, 5)


def test_an_order_that_another_number_of_processes_does_not_have_is_refused(tmp_path: Path) -> None:
    run_ranks(_read, 2, str(tmp_path / "whole"), None, 4, "shuffling loader")
    inside, end = saved(tmp_path / "whole")[1:3]

    with pytest.raises(CheckpointError, match="ordered by 'core' and this run's data is by 'sampl"):
        _read(str(tmp_path / "rest"), inside, 4, "shuffling loader")
    assert _read(str(tmp_path / "rest"), end, 4, "shuffling loader")["epoch"] == 3


# ---- kill -9 -------------------------------------------------------------------------------------


class Mortal(nn.Module):
    """A net that ends its process in the forward pass of one step, as ``kill -9`` does."""

    def __init__(self, dies_in: int) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = make_net()
        self._dies_in, self._step = dies_in, 0

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self._step += 1
            if self._step == self._dies_in:
                os.kill(os.getpid(), signal.SIGKILL)
        out: Tensor = self.layers(inputs)
        return out


def _train(root: str, surgery: list[Any], dies_in: int, ckpt_path: str | None) -> None:
    forget()
    model = Mortal(dies_in)
    trainer = quiet_trainer(root, surgery=surgery)
    trainer.fit(
        model, make_images(), loss=F.cross_entropy, optimizer=OPTIMIZERS["sgd"],
        lr_scheduler=milestones, ckpt_path=ckpt_path,
    )  # fmt: skip
    torch.save(model.state_dict(), f"weights-{os.environ['RANK']}.pt")


@pytest.mark.parametrize(
    "surgery", [[], pytest.param(["cutmix", "label_smoothing"], marks=needs_composer)], ids=str
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_killed_in_a_random_step_resumes_to_the_same_weights(
    world_size: int, surgery: list[Any], tmp_path: Path
) -> None:
    def end(place: str, dies_in: int, ckpt_path: str | None) -> tuple[list[int | None], list[Any]]:
        directory = tmp_path / place
        directory.mkdir(exist_ok=True)
        words = (str(directory), surgery, dies_in, ckpt_path)
        with forked_ranks(_train, world_size, *words, directory=directory) as processes:
            codes = processes.codes()
        return codes, [torch.load(file) for file in sorted(directory.glob("weights-*.pt"))]

    dies_in = random.SystemRandom().randrange(2, 12 // world_size)
    _, expected = end("whole", 0, None)
    killed, _ = end("part", dies_in, None)
    _, results = end("part", 0, "last")

    assert -signal.SIGKILL in killed
    assert len(expected) == world_size
    for one, other in zip(expected, results, strict=True):
        assert different(one, other) == [], f"killed in step {dies_in}"
