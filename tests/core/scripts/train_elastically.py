"""A run under torchrun --max-restarts: the first attempt comes to harm, the next one goes on.

train_elastically.py HARM WHO ROOT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.core.scripts import train_and_fail


def main(harm: str, who: str, root: str) -> None:
    """Train; after a restart from the last checkpoint."""
    saved = any(Path(root).glob("*/step-*"))
    print("attempt", os.environ["TORCHELASTIC_RESTART_COUNT"], "of rank", os.environ["RANK"])
    if saved:
        train_and_fail.main("none", harm, who, root, "last")
    else:
        train_and_fail.main("forward", harm, who, root)


if __name__ == "__main__":
    main(*sys.argv[1:])
