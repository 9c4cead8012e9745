"""``torchweld train``: a recipe, run or shown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from torchweld.cli.building import working_directory
from torchweld.cli.recipe import Recipe, open_recipe
from torchweld.cli.recipe_objects import fit_arguments, look_up, trainer_arguments
from torchweld.trainer import Trainer


def train_recipe(path: Path, words: Sequence[str]) -> None:
    """Train what the recipe says; every process of a launch calls it.

    Raises:
        TorchweldError: the recipe, the plan or the run cannot be used.
    """
    with working_directory():
        recipe = open_recipe(path, words)
        look_up(recipe)  # a mistake is told before data is loaded
        trainer = Trainer(**trainer_arguments(recipe))
        result = trainer.fit(**fit_arguments(recipe))
        if recipe.export:
            trainer.export(recipe.export)
    if os.environ.get("RANK", "0") != "0":
        return
    shown = [f"{name} {value:.4g}" for name, value in sorted(result.metrics.items())]
    click.echo("   ".join([f"step {result.progress.step}", *shown]))
    if recipe.export:
        click.echo(f"weights: {recipe.export}")


def show_recipe(path: Path, words: Sequence[str]) -> bool:
    """Print what a recipe would do and start nothing; returns whether it could run.

    Raises:
        InvalidArgument: the recipe cannot be used.
    """
    with working_directory():
        recipe = open_recipe(path, words)
        table = _table(recipe)
        trainer = Trainer(**trainer_arguments(recipe))
    click.echo(table)
    click.echo(trainer.plan.explain().rstrip())
    return not trainer.plan.has_errors


def _table(recipe: Recipe) -> str:
    rows = look_up(recipe)
    width = max(len(where) for where, _ in rows)
    return "\n".join(f"{where.ljust(width)}  {meaning}" for where, meaning in rows) + "\n"
