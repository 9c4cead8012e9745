"""The functions a user calls, light to import; what they need is imported when they run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchweld_ffcv.conversion import Converted
    from torchweld_ffcv.kinds import Kind


def convert(
    source: Any,
    path: str | Path,
    *,
    fields: Mapping[str, Kind | Any] | None = None,
    workers: int | None = None,
    skip_bad: bool = False,
    allow_random: bool = False,
    progress: bool = False,
) -> Converted:
    """Write a dataset as a ``.beton`` file that FFCV reads, on all cores.

    The file is written beside ``path`` and put in its place when it is whole; until then, and
    after any failure, an older file stays as it was. JPEG files keep their bytes.

    Args:
        source: a map-style Dataset (samples are tuples, mappings or bare values), a DataLoader
            (its dataset is taken), a folder of images in class folders, or any iterable.
        path: of the file.
        fields: field name to a record of :mod:`torchweld_ffcv.kinds` or a field object of FFCV:
            all fields of a tuple in their order, or those keys of a mapping that are wanted.
            None: found out from the first samples.
        workers: processes; None: as many as there are cores.
        skip_bad: leave out samples that cannot be read or stored, and list them in the file.
        allow_random: accept a dataset whose samples differ each time they are read.
        progress: show a progress bar.

    Raises:
        ConversionError: a sample, a worker or the disk failed; names the sample and the field.
        InvalidArgument: ``source`` is no dataset, or empty.
    """
    from torchweld_ffcv.conversion import Wishes, convert_source
    from torchweld_ffcv.foreign import kinds_of
    from torchweld_ffcv.sources import as_source

    wishes = Wishes(kinds_of(fields), workers, skip_bad, allow_random, progress)
    return convert_source(as_source(source), Path(path), wishes)
