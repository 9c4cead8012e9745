"""What is converted: a folder of images, a dataset, a DataLoader's dataset, an iterable."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchweld.errors import InvalidArgument
from torchweld.guard import attempt, one_line
from torchweld_ffcv.values import ImageFile, describe

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""File names that torchvision's ImageFolder takes for images."""


@dataclass(frozen=True)
class Source:
    """A dataset as the writer sees it.

    Attributes:
        label: for messages.
        length: number of samples, or None for an iterable.
        read: sample by index, for a map-style dataset.
        iterate: a fresh iterator, for an iterable.
        names: of a sample's fields where the source knows them.
        files: ``(path, target)`` of a folder of images, for its fingerprint; else empty.
        dataset: what was given, without the wrappers around it.
    """

    label: str
    length: int | None
    read: Callable[[int], Any] | None = None
    iterate: Callable[[], Iterator[Any]] | None = None
    names: tuple[str, ...] = ()
    files: Sequence[tuple[str, Any]] = ()
    dataset: Any = None

    def describe(self, index: int) -> str:
        """What sample ``index`` is: its file, where there is one."""
        if index < len(self.files):
            return f" ({self.files[index][0]!r})"
        return ""


def as_source(given: Any) -> Source:
    """Find out how ``given`` is read.

    Raises:
        InvalidArgument: it is no dataset, or an empty one.
    """
    if isinstance(given, (str, os.PathLike)):
        return folder_source(Path(given))
    dataset = _inner_dataset(given)
    if isinstance(dataset, (Mapping, bytes)):
        raise InvalidArgument(
            f"{describe(dataset)} is no dataset; give a Dataset, a list of samples, a folder"
        )
    folder = _folder_of(dataset)
    if folder is not None:
        return _files_source(_label(folder), _files_of(dataset), folder, folder.target_transform)
    if _is_map_style(dataset):
        return _map_source(dataset)
    if hasattr(dataset, "__iter__"):
        return Source(_label(dataset), None, iterate=lambda: iter(dataset), dataset=dataset)
    raise InvalidArgument(
        f"{describe(given)} is no dataset: it has neither __getitem__ and __len__ nor __iter__"
    )


def load_object(words: str) -> Any:
    """Import ``"package.module:object"`` and call it if it is a function that makes a dataset.

    Raises:
        InvalidArgument: there is no such module or object, or calling it failed.
    """
    module_name, _, name = words.partition(":")
    module = attempt(importlib.import_module, module_name)
    if module.value is None:
        reason = one_line(module.error) if module.error else ""
        raise InvalidArgument(f"{words!r}: the module cannot be imported: {reason}")
    found: Any = module.value
    for part in name.split("."):
        if not hasattr(found, part):
            raise InvalidArgument(f"{words!r}: {module_name} has no {name!r}")
        found = getattr(found, part)
    if _is_map_style(found) or not callable(found):
        return found
    made = attempt(found)
    if made.error is not None:
        raise InvalidArgument(f"{words!r}: calling it failed: {one_line(made.error)}")
    return made.value


def folder_source(directory: Path) -> Source:
    """Images in class folders, as torchvision's ImageFolder finds them: one folder a class.

    Raises:
        InvalidArgument: there is no such folder, or nothing in it.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        hint = ", already a .beton file" if directory.suffix == ".beton" else ""
        raise InvalidArgument(
            f"the dataset {str(directory)!r} {what}{hint}; give a folder with one folder of images "
            "for each class, or a dataset as package.module:object"
        )
    classes = sorted(entry.name for entry in directory.iterdir() if entry.is_dir())
    files = [
        (path, label) for label, name in enumerate(classes) for path in _images(directory / name)
    ]
    if not files:
        raise InvalidArgument(
            f"{str(directory)!r} has no images in class folders ({len(classes)} folders); expected "
            f"{directory}/CLASS/image.jpg"
        )
    return _files_source(str(directory), files, None)


def _images(directory: Path) -> Iterator[str]:
    # The order of torchvision's make_dataset, so that index i is the same picture in both.
    for root, _, names in sorted(os.walk(directory, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield os.path.join(root, name)  # noqa: PTH118  # a million of them


def _files_source(
    label: str,
    files: Sequence[tuple[str, Any]],
    dataset: Any,
    change_target: Callable[[Any], Any] | None = None,
) -> Source:
    def read(index: int) -> tuple[ImageFile, Any]:
        path, target = files[index]
        data = Path(path).read_bytes()
        return ImageFile(path, data), target if change_target is None else change_target(target)

    names = ("image", "label")
    return Source(label, len(files), read=read, names=names, files=files, dataset=dataset)


def _map_source(dataset: Any) -> Source:
    length = attempt(len, dataset)
    if length.value is None:
        reason = one_line(length.error) if length.error else ""
        raise InvalidArgument(f"{_label(dataset)} cannot tell its length: {reason}")
    if not length.value:
        raise InvalidArgument(f"{_label(dataset)} is empty: there is nothing to convert")
    return Source(_label(dataset), length.value, read=dataset.__getitem__, dataset=dataset)


def _inner_dataset(given: Any) -> Any:
    """The dataset of a DataLoader, or ``given`` itself."""
    data = sys.modules.get("torch.utils.data")
    return given.dataset if data is not None and isinstance(given, data.DataLoader) else given


def _is_map_style(dataset: Any) -> bool:
    data = sys.modules.get("torch.utils.data")
    if data is not None and isinstance(dataset, data.IterableDataset):
        return False
    # torch's Dataset has __getitem__ also where a subclass only iterates, but no __len__.
    return all(hasattr(dataset, name) for name in ("__getitem__", "__len__"))


def _folder_of(dataset: Any) -> Any:
    """The torchvision ImageFolder in ``dataset``, if it reads its files as usual, else None."""
    data, folder = sys.modules.get("torch.utils.data"), sys.modules.get("torchvision.datasets")
    if data is not None and type(dataset) is data.Subset:
        return _folder_of(dataset.dataset)
    if folder is None or not isinstance(dataset, folder.ImageFolder):
        return None
    joint = getattr(dataset, "transforms", None)
    usual = (
        type(dataset).__getitem__ is folder.ImageFolder.__getitem__
        and dataset.loader is folder.folder.default_loader
        and (joint is None or type(joint).__name__ == "StandardTransform")
    )
    return dataset if usual else None


def _files_of(dataset: Any) -> Sequence[tuple[str, Any]]:
    """The files of an ImageFolder or of a Subset of one."""
    if not hasattr(dataset, "indices"):
        return list(dataset.samples)
    inner = _files_of(dataset.dataset)
    return [inner[int(index)] for index in dataset.indices]


def _label(dataset: Any) -> str:
    root = getattr(dataset, "root", None)
    name = type(dataset).__name__
    return f"{name} {str(root)!r}" if isinstance(root, (str, os.PathLike)) else f"the {name}"
