"""The loader for whoever keeps the training loop: used as torch's DataLoader is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from torchweld_ffcv.options import FfcvOptions, is_whole

if TYPE_CHECKING:
    from torchweld.interfaces import Env
    from torchweld_ffcv.loader import FfcvLoader


class Loader:
    """Batches of a ``.beton`` file, or of a dataset that becomes one, without a Trainer.

    Each ``iter`` begins the next epoch, in another order and with other crops; where a process
    group exists, every process reads its share of each epoch.

    Args:
        data: a ``.beton`` file, a Dataset, a DataLoader (which brings batch size, shuffle and
            drop_last of its own), a folder of images in class folders, or an iterable that can be
            read again.
        batch_size: samples in a batch of this process.
        shuffle: another order in every epoch.
        seed: of order and crops; the same in all processes.
        drop_last: leave out an incomplete last batch.
        spec: field to ``image(…)``, ``int64()``, ``float32()``, ``skip()``.
        fields: how a Dataset is stored, of ``torchweld_ffcv.kinds``; None: found out.
        skip_bad: leave out samples that cannot be converted.
        num_workers: threads that read; None: this process's share of the cores.
        train: False for evaluation: in order, the middle instead of random crops, no flips.
        cache_dir: where a converted Dataset is kept; None: the user's cache.

    Raises:
        InvalidArgument: the data or the options cannot be read in this way.
        BetonError: the file is missing or damaged.
        ConversionError: a sample cannot be written.
        PluginError: ffcv is missing.
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        spec: Mapping[str, Any] | None = None,
        fields: Mapping[str, Any] | None = None,
        skip_bad: bool = False,
        num_workers: int | None = None,
        train: bool = True,
        cache_dir: str | None = None,
    ) -> None:
        # Imported here, as the plugin is listed without torch.
        from torch.utils.data import DataLoader

        from torchweld.interfaces import LoaderRequest
        from torchweld_ffcv.source import FfcvSource

        if not is_whole(seed) or not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed!r} is not an integer from 0 to 2**63 - 1")
        options = FfcvOptions(
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            spec=spec,
            fields=fields,
            skip_bad=skip_bad,
            num_workers=num_workers,
            cache_dir=cache_dir,
        )
        source = FfcvSource(**vars(options))
        env = _this_process()
        # No other one: on_unsupported is "error".
        self._loader = cast("FfcvLoader", source.build(LoaderRequest(data, train, env, seed)))
        self._epoch, self._begun = 0, False
        self.dataset = data.dataset if isinstance(data, DataLoader) else data
        self.batch_size = self._loader.batch_size or 1
        self.contract = self._loader.contract
        self._whole_epoch = len(self._loader) * self.batch_size * env.world_size

    def __len__(self) -> int:
        """Batches an epoch; the same in all processes."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """Begin the next epoch, or the one that was set or loaded."""
        if self._begun:
            self.set_epoch(self._epoch + 1)
        self._begun = True
        return iter(self._loader)

    def samples(self, batch: Any) -> int:
        """Rows of the batch just yielded that count: what is left of it only fills it up.

        On several processes the last batch may need filling, so that all have equally many.
        """
        return self._loader.samples(batch)

    def set_epoch(self, epoch: int) -> None:
        """Make the next ``iter`` that epoch's, from its beginning."""
        self._loader.set_epoch(epoch)
        self._epoch, self._begun = epoch, False

    def state_dict(self) -> dict[str, Any]:
        """Where all processes are; the same on each of them."""
        state: dict[str, Any] = dict(self._loader.state_dict())
        if state["samples"] >= self._whole_epoch:
            return {**state, "epoch": self._epoch + 1, "samples": 0}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next ``iter`` go on behind the last batch of another loader.

        Raises:
            CheckpointError: it read other data.
        """
        self._loader.load_state_dict(state)
        self._epoch, self._begun = int(state["epoch"]), False

    def close(self) -> None:
        """Stop the threads; also done when the program ends."""
        self._loader.close()


def _this_process() -> Env:
    """This process among those of torch's process group, if there is one."""
    import torch
    import torch.distributed as dist

    from torchweld.interfaces import Env

    cpu = torch.device("cpu")
    if not dist.is_available() or not dist.is_initialized():
        return Env(0, 1, 0, cpu)
    rank = dist.get_rank()
    return Env(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)), cpu)
