"""The one place that imports fairscale.

Measured for fairscale 0.4.13 with torch 2.7.0 and 2.13.0: importing ``fairscale.optim`` and
``fairscale.nn.data_parallel`` takes 0.3 s, changes no signal handler, random state or logger. It
adds a warning filter, and it uses torch's names of 2022 (``torch.cuda.amp.custom_fwd`` for one),
which torch announces to remove; nobody who trains can act on that, so it is not shown.
``fairscale.experimental.wgit`` ends the process when pygit2 is missing: never import by scanning.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

from torchweld.errors import PluginError

_INSTALL = "pip install 'torchweld-fsdp[fairscale]'"


def fairscale_module(name: str) -> ModuleType:
    """Import and return a module of fairscale: ``fairscale_module("fairscale.optim")``.

    Raises:
        PluginError: fairscale is missing, or does not work with this torch.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise PluginError(
            f"this strategy runs FairScale's own code, and importing {name} failed ({error}); "
            f"{_INSTALL}"
        ) from error


def hide_deprecations() -> None:
    """Do not show what torch announces about the functions that FairScale's FSDP calls.

    It calls ``_all_gather_base``, ``_reduce_scatter_base`` and ``Tensor.storage()`` in every step,
    and there will be no FairScale that calls others.
    """
    for message in (
        r"`torch.distributed._(all_gather|reduce_scatter)_base` is a private function",
        "TypedStorage is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
