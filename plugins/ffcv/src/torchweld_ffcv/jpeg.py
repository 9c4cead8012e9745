"""Look into a JPEG file without decoding it: is it one that FFCV's decoder reads as RGB?"""

from __future__ import annotations

from dataclasses import dataclass, replace

_START, _END = b"\xff\xd8", b"\xff\xd9"
# SOF0 to SOF2: baseline, extended and progressive with Huffman coding. The others are lossless,
# hierarchical or arithmetic, which libjpeg-turbo may have been built without.
_FRAMES = (0xC0, 0xC1, 0xC2)
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD9))
_SCAN = 0xDA


@dataclass(frozen=True)
class JpegFrame:
    """Size in pixels, and how many colour components: 1 grey, 3 colour, 4 CMYK.

    Attributes:
        has_scan: the file holds coded pixels; without, decoders make a grey picture or none.
    """

    width: int
    height: int
    components: int
    has_scan: bool = True


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """Return the frame of a complete 8-bit JPEG, or None for anything else.

    None also for a file that was cut short: its end marker is missing.

    Source: ITU-T T.81, annex B.
    """
    if not data.startswith(_START):
        return None
    frame, position = None, len(_START)
    while position + 9 < len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in _WITHOUT_LENGTH:
            position += 2
        elif marker in _OTHER_FRAMES:
            return None
        elif marker == _SCAN:
            return _with_scan(frame, data, position + 2 + _length(data, position))
        else:
            if marker in _FRAMES:
                frame = _frame(data, position)
            position += 2 + _length(data, position)
    ended = data[position : position + 2] == _END
    return replace(frame, has_scan=False) if frame is not None and ended else None


def _with_scan(frame: JpegFrame | None, data: bytes, begin: int) -> JpegFrame | None:
    """The frame, when its first scan's data begins there; None when the file was cut short."""
    end = data.find(_END, begin)  # coded pixels never look like a marker
    return None if frame is None or end < 0 else replace(frame, has_scan=end > begin)


def _length(data: bytes, position: int) -> int:
    """Of the segment whose marker is there, without the marker."""
    return int.from_bytes(data[position + 2 : position + 4], "big")


def _frame(data: bytes, position: int) -> JpegFrame | None:
    bits = data[position + 4]
    height = int.from_bytes(data[position + 5 : position + 7], "big")
    width = int.from_bytes(data[position + 7 : position + 9], "big")
    if bits != 8 or not height or not width:
        return None
    return JpegFrame(width, height, data[position + 9])
