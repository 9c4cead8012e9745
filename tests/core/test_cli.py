from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.core.distributions import OFFER, Site, break_everything
from torchweld import Settings, Use
from torchweld.cli import main
from torchweld.cli.choices import read_choices, read_value, read_words
from torchweld.errors import InvalidArgument

needs_torch = pytest.mark.skipif(not find_spec("torch"), reason="needs torch")

COMMANDS = """
import click

@click.command()
@click.argument("word")
def convert(word):
    click.echo(f"converted {word}")

@hookimpl
def torchweld_commands():
    return [convert]
"""


def run(*arguments: str, **environ: str) -> Result:
    return CliRunner().invoke(main, list(arguments), env=environ)


# ---- the grammar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1_000", -1000),
        ("0.5", 0.5),
        ("1e-3", 0.001),
        ("inf", float("inf")),
        ("true", True),
        ("True", "True"),
        ("bf16", "bf16"),
        ("007", "007"),
        ("'1'", "1"),
        ('"a\\tb"', "a\tb"),
        ("[1, 'a,b', [2]]", [1, "a,b", [2]]),
        ("[]", []),
        ("/data/train.beton", "/data/train.beton"),
    ],
)
def test_a_value_is_a_toml_literal_or_a_bare_word(text: str, value: object) -> None:
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)


@pytest.mark.parametrize("text", ["", "[1", "'a", "{a = 1}"])
def test_a_value_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        read_value(text)


def test_choices_are_parted_by_comma_and_options_by_colon() -> None:
    choices = read_choices("blurpool,cutmix:alpha=0.5:name='x,y:z',c:sizes=[1,2]")

    assert choices == [
        "blurpool",
        Use("cutmix", {"alpha": 0.5, "name": "x,y:z"}),
        Use("c", {"sizes": [1, 2]}),
    ]


@pytest.mark.parametrize("text", ["a,,b", "a:alpha", "a:=1", "a:x='1", ""])
def test_a_choice_that_does_not_fit_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        read_choices(text)


def test_words_are_choices_and_settings() -> None:
    asked = read_words(
        ["strategy=ddp", "surgery=a,b", "surgery=c", "precision=bf16-mixed", "gradient_clip_val=1"]
    )

    assert asked.strategy == ["ddp"]
    assert asked.surgery == ["a", "b", "c"]
    assert asked.settings == Settings(precision="bf16", gradient_clip_val=1.0)


def test_precision_32_is_a_word_although_it_reads_like_a_number() -> None:
    assert read_words(["precision=32"]).settings.precision == "32"


# ---- torchweld plan


def test_plan_of_good_choices_exits_with_0() -> None:
    result = run("plan", "strategy=ddp", "precision=bf16", "--world-size", "2")

    assert result.exit_code == 0, result.output
    assert "2 processes" in result.output
    assert "precision bf16" in result.output
    assert "ddp" in result.output


def test_plan_takes_ddp_for_several_processes_and_single_for_one() -> None:
    several = json.loads(run("plan", "--json", "--world-size", "2").stdout)
    one = json.loads(run("plan", "--json").stdout)

    assert [c["name"] for c in several["order"]] == ["torch", "ddp"]
    assert [c["name"] for c in one["order"]] == ["torch", "single"]


def test_plan_shows_every_mistake_with_code_and_fix_and_exits_with_1(site: Site) -> None:
    site.plugin("pooling")

    result = run("plan", "strategy=deepsped", "surgery=poolin,pooling:alfa=1")

    assert result.exit_code == 1
    assert "nothing was started; 3 problems" in result.output
    assert "no strategy is called 'deepsped'" in result.output
    assert "did you mean 'deepspeed'?" in result.output  # whether it is installed or not
    assert "did you mean 'pooling'?" in result.output
    assert "pooling has no option 'alfa'" in result.output


def test_plan_as_json_has_the_problems_as_data() -> None:
    result = run("plan", "strategy=fdsp", "--json")

    assert result.exit_code == 1
    assert [p["code"] for p in json.loads(result.stdout)["problems"]] == ["TW101"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["precison=bf16"], "did you mean 'precision'?"),
        (["ddp"], "is no key=value word"),
        (["precision=8"], "precision is '32' or 'bf16'"),
        (["accumulate_grad_batches=many"], "accumulate_grad_batches is int, not str"),
        (["surgery=a:b"], "a:b has no value; write a:b=value"),
        (["val_data=torch,torch"], "val_data takes one data source"),
        (["--world-size", "0"], "world-size"),
    ],
)
def test_plan_used_wrongly_exits_with_2(arguments: list[str], said: str) -> None:
    result = run("plan", *arguments)

    assert result.exit_code == 2
    assert said in result.output


def test_plan_with_two_strategies_says_why_not() -> None:
    result = run("plan", "strategy=single,ddp")

    assert result.exit_code == 1
    assert "TW201" in result.output


def test_strict_makes_an_error_of_a_warning() -> None:
    environ = {"TORCHWELD_DISABLE": "nobody"}

    assert run("plan", **environ).exit_code == 0
    assert run("plan", "--strict", **environ).exit_code == 1


# ---- the other commands


def test_plugins_lists_what_can_be_chosen_with_its_origin(site: Site) -> None:
    site.plugin("pooling", version="2.1", more=', needs=["click", "nobody-has-this>=3"]')

    lines = run("plugins").output.splitlines()

    assert any(line.startswith("strategy") and "ddp" in line for line in lines)
    (line,) = (line for line in lines if "does pooling" in line)
    assert "torchweld-pooling 2.1" in line
    assert "click 8" in line
    assert "needs nobody-has-this>=3, which is not installed" in line


def test_plugins_as_json_describes_options_and_needs(site: Site) -> None:
    site.plugin("pooling")

    data = json.loads(run("plugins", "--json").stdout)

    ddp = next(c for c in data["components"] if c["name"] == "ddp")
    assert {"name": "bucket_cap_mb", "type": "int", "default": "25"} in ddp["options"]
    pooling = next(c for c in data["components"] if c["name"] == "pooling")
    assert pooling["outside_site_packages"] is True
    assert pooling["entry_point"] == "pooling"


def test_a_broken_plugin_is_one_entry_with_the_way_to_switch_it_off(site: Site) -> None:
    site.plugin("peftless", source="import peft_of_nobody", requires="peft-of-nobody>=0.10")

    text = " ".join(run("plugins").output.split())

    assert "broken torchweld-peftless 1.0: ModuleNotFoundError: No module named" in text
    assert "its metadata asks for peft-of-nobody>=0.10, which is not installed" in text
    assert "TORCHWELD_DISABLE=peftless" in text


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plugins"], 0, "torchweld-hook_raises"),
        (["plugins", "--json"], 0, "hook_raises"),
        (["plan", "strategy=ddp"], 0, "broken, not used: torchweld-a_class, torchweld-exits"),
        (["explain", "TW302"], 0, "TW302"),
        (["doctor"], 1, "torchweld-hook_raises"),
        (["--help"], 0, "doctor"),
        (["hook_raises", "convert", "x"], 1, "torchweld_surgeries raised KeyError"),
    ],
)
def test_every_command_answers_while_everything_is_broken(
    site: Site, arguments: list[str], code: int, said: str
) -> None:
    break_everything(site)

    result = run(*arguments)

    assert result.exit_code == code, result.output
    assert said in result.output


def test_duplicates_disabled_and_unknown_names_are_listed(site: Site) -> None:
    site.plugin("twin", distribution="torchweld-twin-a", entry_point="twin-a")
    site.plugin("twin", distribution="torchweld-twin-b", entry_point="twin-b")
    site.plugin("lora")

    text = " ".join(run("doctor", TORCHWELD_DISABLE="lora,nobody").output.split())

    assert "twin is offered by torchweld-twin-a 1.0" in text
    assert "torchweld-twin-b 1.0" in text
    assert "disabled lora" in text
    assert "TORCHWELD_DISABLE names 'nobody'" in text


@needs_torch
def test_doctor_names_versions_and_unmet_needs(site: Site) -> None:
    site.plugin("needy", more=', needs=["nobody-has-this>=3"]')

    result = run("doctor")

    assert "python" in result.output
    assert "torch 2." in result.output
    assert "pluggy 1." in result.output
    assert "needy needs nobody-has-this>=3, which is not installed" in result.output


def test_explain_prints_the_page_of_a_code() -> None:
    result = run("explain", "tw302")

    assert result.exit_code == 0, result.output
    assert "TW302" in result.output


def test_explain_lists_the_codes_for_an_unknown_one() -> None:
    result = run("explain", "TW999")

    assert result.exit_code == 2
    assert "TW401  a cycle in the order" in result.output


def test_a_plugins_commands_appear_under_its_entry_point(site: Site) -> None:
    offer = OFFER.format(name="beton", module="torchweld_beton", more="")
    site.plugin("beton", source=offer + COMMANDS)

    assert run("beton", "convert", "x").output == "converted x\n"
    assert "beton" in run("--help").output


def test_a_plugin_whose_commands_raise_is_one_line(site: Site) -> None:
    offer = OFFER.format(name="beton", module="torchweld_beton", more="")
    hook = "\n@hookimpl\ndef torchweld_commands():\n    raise OSError('no home')\n"
    site.plugin("beton", source=offer + hook)

    result = run("beton", "convert", "x")

    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert "torchweld_commands raised OSError: no home" in result.output


def test_doctor_prints_what_a_plugin_says_this_machine_lacks(site: Site) -> None:
    offer = OFFER.format(name="beton", module="torchweld_beton", more="")
    hook = "\n@hookimpl\ndef torchweld_doctor():\n    return ['no OpenCV: apt-get install it']\n"
    site.plugin("beton", source=offer + hook)

    result = run("doctor")

    assert "beton      no OpenCV: apt-get install it" in result.output
    assert "nothing is broken" not in result.output


def test_an_unknown_command_is_suggested() -> None:
    result = run("plugin")

    assert result.exit_code == 2
    assert "did you mean 'plugins'?" in result.output


# ---- torchweld inspect


@needs_torch
def test_inspect_of_nothing_says_so_in_one_line(tmp_path: Path) -> None:
    result = run("inspect", str(tmp_path / "nothing"))

    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One of a tensor, in a directory of runs."""
    import torch

    from torchweld.checkpoint import write
    from torchweld.interfaces import Shard

    shards = [Shard("model/w", torch.zeros(3), (3,), (0,))]
    header = {"step": 5, "epoch": 0, "samples": 20, "metrics": {}, "model_digest": "aa"}
    return write(tmp_path / "runs" / "one" / "step-5", shards=shards, header=header)


@needs_torch
def test_inspect_of_an_intact_checkpoint_exits_with_0(checkpoint: Path) -> None:
    text, data = run("inspect", str(checkpoint)), run("inspect", str(checkpoint), "--json")

    assert (text.exit_code, data.exit_code) == (0, 0)
    assert "all intact" in text.output
    assert (json.loads(data.stdout)["damage"], json.loads(data.stdout)["step"]) == ([], 5)


@needs_torch
@pytest.mark.parametrize("name", ["manifest.json", "00000.json", "00000.safetensors"])
@pytest.mark.parametrize("words", [[], ["strategy=single"]])
def test_inspect_exits_with_1_for_a_damaged_checkpoint(
    checkpoint: Path, name: str, words: list[str]
) -> None:
    (checkpoint / name).unlink()

    result = run("inspect", str(checkpoint), *words)

    assert result.exit_code == 1
    assert name in result.output


@needs_torch
def test_inspect_of_a_directory_of_runs_lists_them(checkpoint: Path) -> None:
    result = run("inspect", str(checkpoint.parent.parent))

    assert result.exit_code == 0
    assert result.output.startswith(f"{checkpoint}   step 5")


@needs_torch
def test_a_directory_of_runs_cannot_be_compared_with_a_plan(checkpoint: Path) -> None:
    result = run("inspect", str(checkpoint.parent.parent), "strategy=single")

    assert result.exit_code == 2
    assert f"one checkpoint, such as {checkpoint}" in result.output


@needs_torch
def test_a_checkpoint_that_no_run_wrote_cannot_be_compared_with_a_plan(checkpoint: Path) -> None:
    result = run("inspect", str(checkpoint), "strategy=single")

    assert result.exit_code == 1
    assert "was not written by a run" in result.output


@needs_torch
@pytest.mark.parametrize("option", [[], ["--json"]])
def test_inspect_reads_every_file_once(
    checkpoint: Path, option: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchweld.checkpoint.files import Stamp

    read: list[str] = []
    whole = Stamp.of

    def counted(path: Path) -> Stamp:
        read.append(path.name)
        return whole(path)

    monkeypatch.setattr(Stamp, "of", counted)
    run("inspect", str(checkpoint), *option)

    assert sorted(read) == ["00000.json", "00000.safetensors"]


@pytest.mark.parametrize("name", sorted(main.commands))
def test_examples_in_a_help_text_have_a_line_each(name: str) -> None:
    shown = run(name, "--help").output

    assert "\\b" not in shown
    lines = [line.strip() for line in shown.splitlines() if line.strip().startswith("torchweld ")]
    assert [line for line in lines if line.count("torchweld ") > 1 + line.count(" -m ")] == []
