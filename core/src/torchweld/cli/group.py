"""The command group: core's commands, and those of plugins under their entry point's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from torchweld.cli.screens import broken_line
from torchweld.plugins.discovery import Broken, names_of
from torchweld.registry import Registry
from torchweld.spelling import canonical, did_you_mean


class PluginGroup(click.Group):
    """Looks for a plugin only when a word is no command of core, so those never wait for one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Core's commands, then the plugins that have some."""
        core = super().list_commands(ctx)
        return [*core, *sorted(set(Registry.installed().commands()) - set(core))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command of core, or the group of a plugin."""
        own = super().get_command(ctx, cmd_name)
        return own or _plugin_group(Registry.installed(), cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Say "did you mean" for a word that is no command."""
        if args and self.get_command(ctx, args[0]) is None:
            commands = self.list_commands(ctx)
            meant = did_you_mean(args[0], commands) or f"the commands are {', '.join(commands)}"
            ctx.fail(f"there is no command {args[0]!r}; {meant}")
        return super().resolve_command(ctx, args)


def _plugin_group(registry: Registry, name: str) -> click.Command | None:
    commands, broken = registry.gather_commands()
    if name in commands:
        return _group(name, commands[name])
    for fault in (*broken, *registry.broken):
        if canonical(name) in names_of(fault):
            return _failing(name, fault)
    return None


def _group(name: str, commands: Sequence[Any]) -> click.Command:
    wrong = [item for item in commands if not isinstance(item, click.Command)]
    if wrong:
        error = f"torchweld_commands returned {type(wrong[0]).__name__}, not click.Command"
        return _failing(name, Broken(name, "", "", "", error))
    group = click.Group(name, help=f"Commands of the plugin {name}.")
    for command in commands:
        group.add_command(command)
    return group


def _failing(name: str, fault: Broken) -> click.Command:
    """A command that says in one line why the plugin's own cannot be had."""

    @click.pass_context
    def fail(ctx: click.Context) -> None:
        click.echo(f"torchweld {name}: {broken_line(fault)}", err=True)
        ctx.exit(1)

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(
        name, callback=fail, context_settings=settings, help=f"Broken: {fault.error}"
    )
