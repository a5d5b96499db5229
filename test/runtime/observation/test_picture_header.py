"""Faults pinned: a size read from the wrong place, a cut JPEG that OpenCV fills with grey, memory
and time that a small message asks for."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pi05_ros.observation.decode import PictureHeader, read_picture_header

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def encoded(extension: str, pixels: np.ndarray = PIXELS, *options: int) -> bytes:
    return bytes(cv2.imencode(extension, pixels, options)[1])


def test_size_and_depth_are_read() -> None:
    assert read_picture_header(encoded(".jpg")) == PictureHeader("JPEG", 40, 24, 8)
    progressive = encoded(".jpg", PIXELS, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    assert read_picture_header(progressive) == PictureHeader("JPEG", 40, 24, 8)
    assert read_picture_header(encoded(".png")) == PictureHeader("PNG", 40, 24, 8)
    assert read_picture_header(encoded(".png", PIXELS.astype(np.uint16))).bits == 16


def test_segments_before_the_frame_header_are_passed_over() -> None:
    """An Exif segment may hold what looks like a frame header: a thumbnail."""
    thumbnail = b"\xff\xc0\x00\x11\x08\x00\x01\x00\x01"
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    jpeg = encoded(".jpg")
    padded = jpeg[:2] + segment + b"\xff" + jpeg[2:]
    assert read_picture_header(padded) == PictureHeader("JPEG", 40, 24, 8)


def test_every_cut_jpeg_is_refused() -> None:
    jpeg = encoded(".jpg")
    for length in range(3, len(jpeg) - 1):
        with pytest.raises(ValueError, match="cut short"):
            read_picture_header(jpeg[:length])


def test_a_cut_png_header_is_refused() -> None:
    for length in range(8, 26):
        with pytest.raises(ValueError, match="cut short"):
            read_picture_header(encoded(".png")[:length])


@pytest.mark.parametrize("raw", [b"", b"\xff\xd8", b"GIF89a", b"RIFF", encoded(".bmp")])
def test_other_formats_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="neither JPEG nor PNG"):
        read_picture_header(raw)


def test_a_scan_before_the_frame_header_is_refused() -> None:
    with pytest.raises(ValueError, match="without a frame header"):
        read_picture_header(b"\xff\xd8\xff\xda" + bytes(20) + encoded(".jpg"))


def test_a_png_chunk_that_does_not_fit_is_refused() -> None:
    """Pins: OpenCV allocates what a chunk claims, 2 GB for an 8 × 8 picture of 141 bytes."""
    png = encoded(".png", PIXELS[:8, :8])
    for chunk in (b"IDAT", b"IEND"):
        at = png.index(chunk) - 4
        for length in (len(png), 0x7FFFFFFF, 0xFFFFFFAA):
            with pytest.raises(ValueError, match="without its end"):
                read_picture_header(png[:at] + length.to_bytes(4, "big") + png[at + 4 :])


def test_a_jpeg_of_too_many_scans_is_refused() -> None:
    """Pins: minutes of decoding for a message of a megabyte."""
    jpeg = encoded(".jpg", PIXELS, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    repeats = 100 - jpeg.count(b"\xff\xda")
    assert read_picture_header(jpeg[:-2] + repeats * last + jpeg[-2:]).width == 40
    with pytest.raises(ValueError, match="101 scans"):
        read_picture_header(jpeg[:-2] + (repeats + 1) * last + jpeg[-2:])


def test_every_cut_png_is_refused() -> None:
    png = encoded(".png")
    for length in range(8, len(png) - 8):
        with pytest.raises(ValueError, match="cut short"):
            read_picture_header(png[:length])
