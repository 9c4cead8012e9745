"""Encode pictures: keep JPEG files byte for byte, store other pixels as they are or as JPEG."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from torchweld.errors import PluginError
from torchweld.guard import attempt, one_line
from torchweld_ffcv import layout
from torchweld_ffcv.errors import ValueRefused
from torchweld_ffcv.jpeg import jpeg_frame
from torchweld_ffcv.kinds import Image
from torchweld_ffcv.values import ImageFile, as_array, describe, is_pil_image, is_tensor

_LONGEST_SIDE = 65535
Pixels = np.ndarray[Any, Any]


class ImageEncoder:
    """Pictures of three channels; ``example`` says whether arrays have them first or last."""

    type_id = layout.IMAGE

    def __init__(self, kind: Image, example: Any) -> None:
        self.kind = kind
        self.axes = image_axes(example)
        if kind.store == "jpeg" or kind.max_side:
            _cv2()  # missing, it is one error here instead of one in every worker

    def arguments(self) -> bytes:
        """None."""
        return b""

    def described(self) -> Mapping[str, Any]:
        """The axes that the dataset's pictures had."""
        return {"dtype": "uint8", "axes": self.axes}

    def encode(self, value: Any, put: Callable[[Any], int]) -> tuple[int, int, int, int]:
        """Write the file's own bytes, or the pixels."""
        if isinstance(value, ImageFile):
            kept = self._kept(value, put)
            if kept is not None:
                return kept
            value = value.open()
        pixels = self._shrunk(self._pixels(value))
        height, width = pixels.shape[:2]
        if not height or not width or max(height, width) > _LONGEST_SIDE:
            raise ValueRefused(f"is {width}x{height} pixels; FFCV stores 1 to {_LONGEST_SIDE}")
        if self.kind.store == "jpeg":
            return layout.JPEG_MODE, width, height, put(_jpeg(pixels, self.kind.quality))
        return layout.RAW_MODE, width, height, put(np.ascontiguousarray(pixels))

    def _kept(self, file: ImageFile, put: Callable[[Any], int]) -> tuple[int, int, int, int] | None:
        frame = jpeg_frame(file.data)
        if frame is not None and not frame.has_scan:  # PIL makes a grey picture of some of them
            raise ValueRefused(
                f"is {file.path!r}, a JPEG file without a scan: there is no picture in it; restore "
                "it, or leave it out with skip_bad=True"
            )
        if frame is None or self.kind.store == "raw":
            return None
        if frame.components not in ({1, 3} if self.kind.to_rgb else {3}):
            return None
        if self.kind.max_side and max(frame.width, frame.height) > self.kind.max_side:
            return None
        return layout.JPEG_MODE, frame.width, frame.height, put(file.data)

    def _pixels(self, value: Any) -> Pixels:
        if is_pil_image(value):
            return self._pil_pixels(value)
        array = as_array(value)
        if array is None:
            raise ValueRefused(f"is {describe(value)}, neither a picture nor an array")
        if array.dtype != np.uint8:
            raise ValueRefused(
                f"is {describe(value)}, and pictures hold uint8: give the pixels as they are "
                "before ToTensor or Normalize, or store the numbers with "
                f"Array({str(array.dtype)!r}, {tuple(array.shape)}) of torchweld_ffcv.kinds"
            )
        return self._array_pixels(value, array)

    def _pil_pixels(self, image: Any) -> Pixels:
        if image.mode == "RGB":
            return np.asarray(image)
        if not self.kind.to_rgb:
            grey = (
                f", or Array('uint8', {(image.height, image.width)})" if image.mode == "L" else ""
            )
            raise ValueRefused(
                f"is {describe(image)}, and FFCV's pictures have three channels; use "
                f"Image(to_rgb=True){grey} of torchweld_ffcv.kinds"
            )
        converted = attempt(lambda: np.asarray(image.convert("RGB")))
        if converted.value is None:
            reason = one_line(converted.error) if converted.error else ""
            raise ValueRefused(f"is {describe(image)}, which PIL cannot convert: {reason}")
        return converted.value

    def _array_pixels(self, value: Any, array: Pixels) -> Pixels:
        pixels = array[..., None] if array.ndim == 2 else array
        if array.ndim == 3 and self.axes == "chw":
            pixels = array.transpose(1, 2, 0)
        channels = pixels.shape[2] if pixels.ndim == 3 else 0
        if channels == 3:
            return pixels
        if not self.kind.to_rgb or channels not in {1, 4}:
            order = "(3, height, width)" if self.axes == "chw" else "(height, width, 3)"
            raise ValueRefused(
                f"is {describe(value)}, and this field's pictures have the shape {order}; "
                "Image(to_rgb=True) of torchweld_ffcv.kinds takes grey and alpha too, "
                "Array('uint8', shape) takes anything of one shape"
            )
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3)) if channels == 1 else pixels[..., :3]

    def _shrunk(self, pixels: Pixels) -> Pixels:
        """Shrink as FFCV's ``max_resolution`` does: longest side, mean over areas."""
        height, width = pixels.shape[:2]
        ratio = (self.kind.max_side or max(height, width)) / max(height, width, 1)
        if ratio >= 1:
            return pixels
        cv2 = _cv2()
        size = (max(1, int(ratio * width)), max(1, int(ratio * height)))
        shrunk: Pixels = cv2.resize(
            np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_AREA
        )
        return shrunk


def image_axes(example: Any) -> str:
    """Where a picture has its channels: ``"hwc"`` or ``"chw"``.

    Where both ends of the shape could be channels, tensors have them first and arrays last.
    """
    array = as_array(example)
    if array is None or array.ndim != 3:
        return "hwc"
    first, last = array.shape[0] in {1, 3, 4}, array.shape[2] in {1, 3, 4}
    return "chw" if first and (is_tensor(example) or not last) else "hwc"


def _jpeg(pixels: Pixels, quality: int) -> Pixels:
    cv2 = _cv2()
    swapped = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".jpg", swapped, [int(cv2.IMWRITE_JPEG_QUALITY), quality])
    if not done:
        raise ValueRefused("could not be encoded as JPEG by OpenCV; use Image(store='raw')")
    return np.asarray(data).reshape(-1)


def _cv2() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise PluginError(
            f"encoding or shrinking pictures needs OpenCV, and importing cv2 failed ({error}): "
            "pip install opencv-python-headless"
        ) from error
    return cv2
