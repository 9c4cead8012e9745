"""Listing and planning import neither torch nor fairscale."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import torchweld_fsdp
from torchweld.planning import make_plan
from torchweld.registry import Registry
registry = Registry({"fsdp": torchweld_fsdp})
for name in ("fsdp", "fairscale_oss", "fairscale_sdp", "fairscale_fsdp"):
    make_plan(registry, strategy=name, data="torch").explain()
print([name for name in ("torch", "fairscale", "numpy") if name in sys.modules])
"""


def test_listing_and_planning_import_nothing_heavy() -> None:
    command = [sys.executable, "-W", "error", "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
