"""What stays out of the process until it is selected."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "composer", "numpy")

CALLS = {
    "import torchweld": "import torchweld",
    "discovery": "from torchweld.registry import Registry; Registry.installed()",
    "torchweld plugins": "run('plugins')",
    "torchweld plugins --json": "run('plugins', '--json')",
    "torchweld plan": "run('plan', 'strategy=ddp', 'surgery=blurpool,cutmix', 'precision=bf16')",
    "torchweld plan with mistakes": "run('plan', 'strategy=dpd', 'surgery=x')",
    "torchweld explain": "run('explain', 'TW302')",
    "torchweld doctor": "run('doctor')",
    "torchweld --help": "run('--help')",
}

PROGRAM = """
import sys

def run(*arguments):
    from torchweld.cli import main
    main(arguments, standalone_mode=False)

{call}
print("loaded:", *[name for name in {heavy} if name in sys.modules])
"""


@pytest.mark.parametrize("call", CALLS)
def test_neither_torch_nor_a_wrapped_library_is_imported(call: str) -> None:
    program = PROGRAM.format(call=CALLS[call], heavy=HEAVY)

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == "loaded:"
