"""``python -m torchweld``: the command line, for launchers that start modules."""

from __future__ import annotations

from torchweld.cli import main

main(prog_name="torchweld")
