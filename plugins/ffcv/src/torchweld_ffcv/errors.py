"""Exceptions of this plugin.

TorchweldError
├── BetonError        a .beton file cannot be read as it is: damaged, unfinished, of another kind
└── ConversionError   a dataset could not be written; carries the sample where there is one
"""

from __future__ import annotations

from torchweld.errors import TorchweldError


class BetonError(TorchweldError):
    """A ``.beton`` file cannot be read; the message names the file, what is wrong and a remedy."""


class ConversionError(TorchweldError):
    """A dataset could not be written as a ``.beton`` file; nothing was left at its path.

    Attributes:
        sample: index of the sample that could not be written, or None.
    """

    def __init__(self, message: str, sample: int | None = None) -> None:
        super().__init__(message)
        self.sample = sample


class ValueRefused(Exception):
    """A value does not fit its field; the worker adds which sample it was."""
