"""The command line: ``torchweld plugins | plan | explain | doctor | inspect | launch | …``.

Every command answers while a plugin is broken; only ``inspect``, ``plan --model`` and the commands
that start something import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchweld.cli.asking import errors_in_one_line
from torchweld.cli.group import PluginGroup
from torchweld.cli.running import launch, new_plugin, train
from torchweld.cli.screens import doctor_text, plugins_data, plugins_text
from torchweld.errors import InvalidArgument
from torchweld.problems import TITLES
from torchweld.registry import Registry
from torchweld.spelling import did_you_mean

if TYPE_CHECKING:
    from torchweld.cli.inspected import Resuming
    from torchweld.plan import Plan
    from torchweld.resolving.memory import Memory


@click.group(cls=PluginGroup)
@click.version_option(package_name="torchweld", message="%(prog)s %(version)s")
def main() -> None:
    """Training speed-ups as plugins, checked against each other before the first step."""


main.add_command(launch)
main.add_command(train)
main.add_command(new_plugin)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print data instead of a table.")
def plugins(as_json: bool) -> None:
    """List what can be chosen, and what is installed but broken."""
    stock = Registry.installed().stock
    click.echo(_json(plugins_data(stock)) if as_json else plugins_text(stock))


@main.command()
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--world-size", type=click.IntRange(1), help="Processes that will be launched.")
@click.option("--allow", multiple=True, metavar="KEY", help="Accept a finding: TW302:cutmix+mixup.")
@click.option("--strict", is_flag=True, help="Make errors of warnings.")
@click.option("--model", metavar="PKG:MAKE", help="Estimate memory for this module or function.")
@click.option("--optimizer", metavar="NAME", help="For --model: adamw, sgd:momentum=0.9, pkg:make.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
def plan(
    words: tuple[str, ...],
    *,
    world_size: int | None,
    allow: tuple[str, ...],
    strict: bool,
    model: str | None,
    optimizer: str | None,
    as_json: bool,
) -> None:
    """Check choices without starting anything.

    \b
    torchweld plan strategy=ddp data=torch surgery=blurpool,cutmix:alpha=0.5
    torchweld plan strategy=ddp precision=bf16 accumulate_grad_batches=4 --world-size 2
    torchweld plan strategy=ddp --world-size 8 --model train:make_model --optimizer adamw

    Values are TOML literals and bare words; quotes protect commas and colons.
    Exits with 1 when the choices cannot run together.
    """  # noqa: D301 - click reads the character
    # Only this command resolves; `torchweld plugins` has 0.3 s in all.
    from torchweld.cli.planned import plan_of_words
    from torchweld.resolving.explain import explain_plan, render_problems
    from torchweld.resolving.memory import HOW_TO_ASK

    if (model is None) != (optimizer is None):
        raise click.UsageError("memory is estimated for --model and --optimizer together")
    registry = Registry.installed()
    with errors_in_one_line():
        made = plan_of_words(registry, words, world_size=world_size, allow=allow, strict=strict)
    memory = None
    if model is not None and optimizer is not None and not made.has_errors:
        memory = _memory(made, model, optimizer, world_size or 1)
    if as_json:
        click.echo(made.to_json(memory=memory))
    elif made.has_errors:
        click.echo(render_problems(made.problems).rstrip())
    else:
        lines = [HOW_TO_ASK] if memory is None else memory.lines()
        click.echo(explain_plan(made, world_size=world_size, memory=lines).rstrip())
    _mention_broken(registry)
    click.get_current_context().exit(1 if made.has_errors else 0)


@main.command()
@click.argument("code")
def explain(code: str) -> None:
    """Print the page of a code: TW302."""
    # Imports tempfile and its kin, 20 ms.
    from importlib import resources

    name = code.upper()
    if name not in TITLES:
        meant = did_you_mean(name, TITLES) or "the codes are:"
        listed = "\n".join(f"  {known}  {title}" for known, title in TITLES.items())
        raise click.UsageError(f"there is no code {code!r}; {meant}\n{listed}")
    page = resources.files("torchweld") / "codes" / f"{name}.md"
    click.echo(page.read_text(encoding="utf-8").rstrip())


@main.command()
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Show versions, plugins, and everything that is wrong with them.

    Exits with 1 when an installed plugin is broken.
    """
    registry = Registry.installed()
    advice, silent = registry.gather_advice()
    faults = (*registry.gather_commands()[1], *silent)
    click.echo(doctor_text(registry.stock, faults, advice))
    ctx.exit(1 if registry.broken or faults else 0)


@main.command(name="inspect")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--world-size", type=click.IntRange(1), help="Processes that would resume it.")
@click.option("--model", metavar="PKG:MAKE", help="Compare with this module or function.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
def inspect_checkpoint(
    checkpoint: Path,
    words: tuple[str, ...],
    *,
    world_size: int | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Show what is in a checkpoint or a run, and whether it is intact.

    With the words of a plan, also what resuming under it would change.

    \b
    torchweld inspect runs/1124-0931-7c41e0/step-90
    torchweld inspect runs/1124-0931-7c41e0/step-90 strategy=ddp surgery=blurpool --world-size 2

    Exits with 0 when it is intact and can be resumed, with 1 when it is damaged or would be
    refused under the plan.
    """  # noqa: D301 - click reads the character
    # torch takes 2-3 s to import; few commands need it.
    from torchweld.checkpoint import describe, inspect

    with errors_in_one_line():
        report = inspect(checkpoint)
        text = describe(report)
        possible = not (report.get("damage") or report.get("complete") is False)
        if possible and (words or world_size is not None or model is not None):
            found = _resuming(report, words, world_size, model)
            report["resume"], possible = found.as_data(), found.is_possible
            text += f"\n\n{found.text()}"
    click.echo(_json(report) if as_json else text)
    click.get_current_context().exit(0 if possible else 1)


def _memory(made: Plan, model: str, optimizer: str, world_size: int) -> Memory:
    # torch takes 2-3 s to import.
    from torchweld.cli.building import estimate_memory

    with errors_in_one_line():
        return estimate_memory(made, model=model, optimizer=optimizer, world_size=world_size)


def _resuming(
    report: Mapping[str, Any], words: Sequence[str], world_size: int | None, model: str | None
) -> Resuming:
    from torchweld.cli.inspected import resuming

    if report["kind"] == "run":
        newest = report["checkpoints"][0]["path"]
        raise InvalidArgument(f"a plan is compared with one checkpoint, such as {newest}")
    return resuming(
        Registry.installed(), Path(report["path"]), words, world_size=world_size, model=model
    )


def _mention_broken(registry: Registry) -> None:
    labels = sorted({broken.label for broken in registry.broken})
    if labels:
        click.echo(f"broken, not used: {', '.join(labels)} (torchweld plugins says why)", err=True)


def _json(data: object) -> str:
    return json.dumps(data, indent=2, sort_keys=True, default=str)
