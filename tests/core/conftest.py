"""Fixtures of core's tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.distributions import Site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A directory of distributions, first on ``sys.path``; nothing else is switched off."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.delenv("TORCHWELD_DISABLE", raising=False)
    monkeypatch.delenv("TORCHWELD_AUTOLOAD", raising=False)
    before = set(sys.modules)

    yield Site(directory)

    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(directory)):
            del sys.modules[name]
    importlib.invalidate_caches()
