"""The command line: ``torchweld plugins | plan | explain | doctor | inspect``.

Every command answers while a plugin is broken; only ``inspect`` may import torch.
"""

from __future__ import annotations

import json

import click

from torchweld.cli.group import PluginGroup
from torchweld.cli.screens import doctor_text, plugins_data, plugins_text
from torchweld.errors import CheckpointError, InvalidArgument
from torchweld.problems import TITLES
from torchweld.registry import Registry
from torchweld.spelling import did_you_mean


@click.group(cls=PluginGroup)
@click.version_option(package_name="torchweld", message="%(prog)s %(version)s")
def main() -> None:
    """Training speed-ups as plugins, checked against each other before the first step."""


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
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
def plan(
    words: tuple[str, ...],
    world_size: int | None,
    allow: tuple[str, ...],
    strict: bool,
    as_json: bool,
) -> None:
    r"""Check choices without starting anything.

    \b
    torchweld plan strategy=ddp data=torch surgery=blurpool,cutmix:alpha=0.5
    torchweld plan strategy=ddp precision=bf16 accumulate_grad_batches=4 --world-size 2

    Values are TOML literals and bare words; quotes protect commas and colons.
    Exits with 1 when the choices cannot run together.
    """
    # Only this command resolves; `torchweld plugins` has 0.3 s in all.
    from torchweld.cli.planned import plan_of_words
    from torchweld.resolving.explain import render_problems

    registry = Registry.installed()
    try:
        made = plan_of_words(registry, words, world_size=world_size, allow=allow, strict=strict)
    except InvalidArgument as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        click.echo(made.to_json())
    elif made.has_errors:
        click.echo(render_problems(made.problems).rstrip())
    else:
        click.echo(made.explain(world_size=world_size).rstrip())
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
    faults = registry.gather_commands()[1]
    click.echo(doctor_text(registry.stock, faults))
    ctx.exit(1 if registry.broken or faults else 0)


@main.command(name="inspect")
@click.argument("checkpoint", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
@click.pass_context
def inspect_checkpoint(ctx: click.Context, checkpoint: str, as_json: bool) -> None:
    """Show what is in a checkpoint or a run, and whether it is intact.

    Exits with 1 when it is damaged.
    """
    # torch takes 2-3 s to import; no other command needs it.
    from torchweld.checkpoint import describe, inspect

    try:
        report = inspect(checkpoint)
        click.echo(_json(report) if as_json else describe(checkpoint))
    except CheckpointError as error:
        raise click.ClickException(str(error)) from None
    damaged = bool(report.get("damage")) or report.get("complete") is False
    ctx.exit(1 if damaged else 0)


def _mention_broken(registry: Registry) -> None:
    labels = sorted({broken.label for broken in registry.broken})
    if labels:
        click.echo(f"broken, not used: {', '.join(labels)} (torchweld plugins says why)", err=True)


def _json(data: object) -> str:
    return json.dumps(data, indent=2, sort_keys=True, default=str)
