"""Size and depth of a JPEG or PNG from its first bytes, before a decoder allocates for them."""

from __future__ import annotations

from typing import NamedTuple

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_HEADER_BYTES = 26
_PNG_CHUNK_BYTES = 12
"""Length, type and checksum, around the chunk's data."""
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
# Start-of-frame markers; C4, C8 and CC share the range and mean other things (ITU T.81, table B.1).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_WITHOUT_LENGTH = frozenset(range(0xD0, 0xD8)) | {0x01}
_JPEG_START_OF_SCAN = 0xDA
_JPEG_MAX_SCANS = 100
"""A progressive picture has about ten. Each takes 23 bytes and a pass over all pixels, 3 ms for 9
million of them."""


class PictureHeader(NamedTuple):
    """What a compressed picture says of itself."""

    kind: str
    width: int
    height: int
    bits: int
    """Per channel."""


def read_picture_header(raw: bytes) -> PictureHeader:
    """Read the header of a JPEG or PNG.

    Raises:
        ValueError: If `raw` is neither or was cut short.
    """
    if raw.startswith(_PNG_SIGNATURE):
        return _png(raw)
    if raw.startswith(_JPEG_SIGNATURE):
        return _jpeg(raw)
    raise ValueError(f"begins with {raw[:4].hex(' ')}, neither JPEG nor PNG; publish one of them")


def _png(raw: bytes) -> PictureHeader:
    """The IHDR chunk, which the format puts first (PNG specification, 11.2.2).

    All chunks up to the end must fit into the data: OpenCV allocates what a chunk says of its
    length, up to 4 GB, before it reads.
    """
    if len(raw) < _PNG_HEADER_BYTES or raw[12:16] != b"IHDR":
        raise ValueError("PNG without a header, the message was cut short")
    at, kind = len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        kind = raw[at + 4 : at + 8]
        at += _PNG_CHUNK_BYTES + int.from_bytes(raw[at : at + 4], "big")
        if at > len(raw):
            raise ValueError("PNG without its end, the message was cut short or is damaged")
    width, height = int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")
    return PictureHeader("PNG", width, height, raw[24])


def _jpeg(raw: bytes) -> PictureHeader:
    """The frame header, wherever it stands among the segments (ITU T.81, B.2.2)."""
    at = 2
    while at + 9 <= len(raw) and raw[at] == 0xFF:
        marker = raw[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _JPEG_WITHOUT_LENGTH:
            at += 2
        elif marker in _JPEG_FRAMES:
            # libjpeg fills a missing rest with grey and only warns.
            if raw.rfind(_JPEG_END, at) < 0:
                raise ValueError("JPEG without its end marker, the message was cut short")
            # in a scan's data a zero follows every FF, so that these two bytes begin a scan
            scans = raw.count(bytes((0xFF, _JPEG_START_OF_SCAN)), at)
            if scans > _JPEG_MAX_SCANS:
                raise ValueError(f"JPEG with {scans} scans, the limit is {_JPEG_MAX_SCANS}")
            height = int.from_bytes(raw[at + 5 : at + 7], "big")
            width = int.from_bytes(raw[at + 7 : at + 9], "big")
            return PictureHeader("JPEG", width, height, raw[at + 4])
        elif marker == _JPEG_START_OF_SCAN:
            break
        else:
            at += 2 + int.from_bytes(raw[at + 2 : at + 4], "big")
    raise ValueError("JPEG without a frame header, the message was cut short")
