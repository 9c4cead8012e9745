"""The commands that start something: ``torchweld launch | train | new-plugin``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from torchweld.cli.asking import errors_in_one_line


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[TORCHRUN OPTIONS]",
    add_help_option=False,
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT [ARGUMENTS]...")
@click.pass_context
def launch(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Start a script in several processes; torchrun does it.

    \b
    torchweld launch --nproc-per-node 2 train.py --epochs 3
    torchweld launch --nproc-per-node 2 -m torchweld train recipe.toml
    torchweld launch --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \\
        --rdzv-endpoint node1:29400 train.py

    Every option is torchrun's (torchrun --help). On one machine --standalone is added; threads are
    shared out among the processes unless OMP_NUM_THREADS says how many.
    """  # noqa: D301 - click reads the character
    if not words or words[0] in {"--help", "-h"}:
        click.echo(ctx.get_help())
        ctx.exit(0)
    # torch takes 2-3 s to import.
    from torch.distributed.run import main as torchrun

    from torchweld.cli.launched import prepare

    given, variables = prepare(words, os.environ)
    for name, value in variables.items():
        click.echo(f"torchweld launch: {name}={value}; set it to choose another number", err=True)
    os.environ.update(variables)
    torchrun(given)


@click.command(name="new-plugin")
@click.argument("name")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Where to make the folder; here by default.",
)
def new_plugin(name: str, directory: Path) -> None:
    """Write a small whole plugin to start from: torchweld new-plugin tidy-relu.

    A surgery that is discovered once it is installed, with its card, a license and the conformance
    tests. Nothing that exists is overwritten.
    """
    from torchweld.cli.new_plugin import next_steps, write_plugin

    with errors_in_one_line():
        folder = write_plugin(name, directory)
    click.echo(next_steps(folder))


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "words", multiple=True, metavar="KEY=VALUE", help="Replace a value.")
@click.option("--dry-run", is_flag=True, help="Print objects and plan, and start nothing.")
@click.pass_context
def train(ctx: click.Context, recipe: Path, words: tuple[str, ...], *, dry_run: bool) -> None:
    """Run a recipe, a TOML file that names model, data, loss, optimizer and settings.

    \b
    torchweld train digits.toml
    torchweld train digits.toml --set trainer.max_epochs=2 --set optimizer.lr=0.05
    torchweld launch --nproc-per-node 2 -m torchweld train digits.toml

    Exits with 2 when the recipe cannot be used, with 1 when the run cannot.
    """  # noqa: D301 - click reads the character
    # torch takes 2-3 s to import.
    from torchweld.cli.trained import show_recipe, train_recipe

    with errors_in_one_line():
        if dry_run:
            ctx.exit(0 if show_recipe(recipe, words) else 1)
        train_recipe(recipe, words)
