"""How every command answers what it was asked wrongly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from torchweld.errors import InvalidArgument, TorchweldError


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Show an error of torchweld without its traceback; a wrong argument exits with 2."""
    try:
        yield
    except InvalidArgument as error:
        raise click.UsageError(str(error)) from None
    except TorchweldError as error:
        raise click.ClickException(str(error)) from None
