"""sensor_msgs Image, CompressedImage and JointState become arrays.

Accepts any object with the message's fields: an rclpy message, one that rosbags reads from a
recording, a namespace in a test. A message is checked before a library decodes it: a header with a
wrong size leads to reads past the end, and an image of a few kilobytes can claim gigabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile

from pi05_ros.types import FloatArray, ImageArray

DEFAULT_MAX_PIXELS = 4096 * 2160

# Encoding → (bytes per pixel, the name that both converters know). 8UC3 and 8UC4 come from OpenCV
# programs, whose order is blue first; RViz and Foxglove read them in the same order.
_ENCODINGS = {
    "rgb8": (3, "rgb8"), "bgr8": (3, "bgr8"), "8UC3": (3, "bgr8"),
    "rgba8": (4, "rgba8"), "bgra8": (4, "bgra8"), "8UC4": (4, "bgra8"),
    "mono8": (1, "mono8"), "8UC1": (1, "mono8"),
    "yuv422": (2, "yuv422"), "uyvy": (2, "yuv422"),
    "yuv422_yuy2": (2, "yuv422_yuy2"), "yuyv": (2, "yuv422_yuy2"),
    "bayer_rggb8": (1, "bayer_rggb8"), "bayer_bggr8": (1, "bayer_bggr8"),
    "bayer_gbrg8": (1, "bayer_gbrg8"), "bayer_grbg8": (1, "bayer_grbg8"),
}  # fmt: skip
_YUV_BYTES_PER_PIXEL = 2
_WIDE_ENCODING_PARTS = ("16", "32", "64", "8S")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_HEADER_BYTES = 26
_PNG_CHUNK_BYTES = 12
"""Length, type and checksum around a chunk's data."""
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_JPEG_SCAN = b"\xff\xda"
"""Begins a scan; inside a scan's data a zero follows every FF."""
_JPEG_END = b"\xff\xd9"
_JPEG_MAX_SCANS = 100
"""A progressive JPEG has about ten. Each takes 23 bytes and 3 ms for 9 million pixels."""

Converter = Callable[[Any], Any]


class DecodeError(ValueError):
    """A message that cannot be used; one line names the field, its value and the remedy."""


@contextmanager
def _decoding(what: str) -> Iterator[None]:
    """Any exception becomes a DecodeError of one line."""
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(f"{what} could not be decoded ({_one_line(error)})") from error


@_decoding("the image")
def decode_image(message: Any, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> ImageArray:
    """Decode a sensor_msgs Image, or a CompressedImage, which has a `format`.

    Converts 8-bit colour and grey encodings, 4:2:2 YUV and Bayer patterns; refuses depth and
    16-bit images. `is_bigendian` does not apply to 8-bit values and is not read.

    rgb8 without padding is not copied: the result is a view of the message's bytes, writable
    where they are, so the message must not be changed afterwards. Other results own their memory.

    Args:
        message: has `width`, `height`, `encoding`, `step`, `data`; or `format` and `data`.
        max_pixels: larger images are refused before anything is decoded.

    Returns:
        RGB, uint8 [height, width, 3], contiguous.

    Raises:
        DecodeError: the message is not an image of these kinds.
    """
    if hasattr(message, "format"):
        return _decode_compressed(message, max_pixels)
    height, width, step = message.height, message.width, message.step
    _check_size(width, height, max_pixels)
    bytes_per_pixel, encoding = _known_encoding(message.encoding)
    if bytes_per_pixel == _YUV_BYTES_PER_PIXEL and width % 2:
        raise DecodeError(f"width: {width} is odd, {encoding} shares colour between two pixels")
    row_bytes = width * bytes_per_pixel
    if step < row_bytes:
        raise DecodeError(
            f"step: {step} is below {row_bytes}, the bytes of {width} pixels in {encoding}; "
            "correct step, width or encoding in the camera driver"
        )
    data = _byte_view(message.data)
    if data.size < step * height:
        raise DecodeError(
            f"data: {data.size} bytes, step {step} × height {height} needs {step * height}; "
            "the message was cut short or its header is wrong"
        )
    rows = np.ascontiguousarray(data[: step * height].reshape(height, step)[:, :row_bytes])
    if encoding == "rgb8":
        return rows.reshape(height, width, 3)
    # Tight rows: rosbags-image ignores step and cv_bridge takes steps of whole pixels only.
    # is_bigendian=0: for other values cv_bridge calls a method that NumPy 2 removed.
    tight = _image(height, width, encoding, row_bytes, rows.reshape(-1))
    return _checked(_converter()[1](tight), width, height, encoding)


def _image(height: int, width: int, encoding: str, step: int, data: Any) -> SimpleNamespace:
    return SimpleNamespace(
        height=height, width=width, encoding=encoding, is_bigendian=0, step=step, data=data
    )


def _decode_compressed(message: Any, max_pixels: int) -> ImageArray:
    import cv2

    if "compressedDepth" in message.format:
        raise DecodeError(f"format: {_show(message.format)} is a depth image, use the colour topic")
    data = _byte_view(message.data)
    try:
        header = read_image_header(data.tobytes())
    except ValueError as error:
        raise DecodeError(f"data: {error} (format {_show(message.format)})") from error
    if header.bits > 8:
        raise DecodeError(
            f"data: {header.kind} with {header.bits} bits per channel, 8 are supported; "
            "use the camera's colour topic"
        )
    _check_size(header.width, header.height, max_pixels)
    # Both converters call imdecode too, without the flags that turn grey, palette and
    # transparent images into three channels and ignore a camera's orientation tag.
    bgr = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if bgr is None:
        raise DecodeError(f"data: the {header.kind} is damaged")
    rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    return _checked(rgb, header.width, header.height, header.kind)


class ImageHeader(NamedTuple):
    """Format, size and bits per channel of a compressed image."""

    kind: str
    width: int
    height: int
    bits: int


def read_image_header(raw: bytes) -> ImageHeader:
    """Read the header of a JPEG or PNG and refuse data that OpenCV would decode at any cost.

    Raises:
        ValueError: `raw` is neither, was cut short, or claims more chunks or scans than allowed.
    """
    if raw.startswith(_PNG_SIGNATURE):
        return _png_header(raw)
    if raw.startswith(_JPEG_SIGNATURE):
        return _jpeg_header(raw)
    raise ValueError(f"begins with {raw[:4].hex(' ')}, neither JPEG nor PNG; publish one of them")


def _png_header(raw: bytes) -> ImageHeader:
    """The IHDR chunk, the first one (PNG specification, 11.2.2).

    All chunks up to IEND must fit into the data: OpenCV allocates the length that a chunk claims,
    up to 4 GB, before it reads.
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
    return ImageHeader("PNG", width, height, raw[24])


def _jpeg_header(raw: bytes) -> ImageHeader:
    stream = BytesIO(raw)
    try:
        # Reads the segments up to the first scan. The class rather than PIL.Image.open, whose
        # limit on pixels is global and above `max_pixels`.
        width, height = JpegImageFile(stream).size
    except Exception as error:
        raise ValueError(f"JPEG without a frame header, cut short or damaged ({error})") from error
    scans_at = stream.tell()
    # libjpeg fills missing rows with grey and only warns.
    if raw.rfind(_JPEG_END, scans_at) < 0:
        raise ValueError("JPEG without its end marker, the message was cut short")
    scans = 1 + raw.count(_JPEG_SCAN, scans_at)
    if scans > _JPEG_MAX_SCANS:
        raise ValueError(f"JPEG with {scans} scans, the limit is {_JPEG_MAX_SCANS}")
    return ImageHeader("JPEG", width, height, 8)


@_decoding("the joint state")
def decode_joint_state(message: Any, names: Sequence[str]) -> FloatArray:
    """Positions [len(names)] of a sensor_msgs JointState in the order of `names`.

    The message may have another order and more joints.

    Raises:
        DecodeError: a joint is missing, given twice, or without a finite position.
    """
    received = list(message.name)
    position = np.asarray(message.position, dtype=np.float64)
    if position.ndim != 1:
        raise DecodeError(f"position: {position.ndim} dimensions, needs one value per joint")
    if position.size < len(received):
        raise DecodeError(
            f"position: {position.size} values for {len(received)} names, joint "
            f"{_show(received[position.size])} has none; the driver must publish positions"
        )
    if position.size > len(received):
        raise DecodeError(
            f"name: {len(received)} names for {position.size} positions, none after joint "
            f"{_show(received[-1]) if received else '(none)'}; the driver must name each joint"
        )
    index: dict[str, int] = {}
    for i, name in enumerate(received):
        if name in index:
            raise DecodeError(f"name: joint {_show(name)} is given twice, publish each joint once")
        index[name] = i
    missing = [name for name in names if name not in index]
    if missing:
        raise DecodeError(
            f"name: joint {', '.join(map(_show, missing))} is missing, the message has "
            f"{_show(received, 200)}; check the joint names of the robot's configuration"
        )
    values = position[[index[name] for name in names]]
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DecodeError(
            f"position: joint {_show(names[bad])} is {values[bad]}, not a finite number; "
            "check its encoder"
        )
    return values


@_decoding("the header")
def stamp_s(header: Any) -> float:
    """Seconds of a std_msgs Header's `stamp`, within 0.24 µs at today's epoch."""
    seconds, nanoseconds = header.stamp.sec, header.stamp.nanosec
    if not 0 <= nanoseconds < 1_000_000_000:
        raise DecodeError(f"nanosec: {nanoseconds} is not within one second")
    return float(seconds + nanoseconds * 1e-9)


def read_in_place(data: bytes, typename: str) -> Any | None:
    """Deserialize a CDR message without copying its arrays, which become views of `data`.

    Args:
        data: with the encapsulation, from any publisher.
        typename: as "sensor_msgs/msg/Image".

    Returns:
        None where rosbags is not installed or refuses the message. A refused message may be valid:
        some middlewares pad behind the last field differently.
    """
    store = _typestore()
    if store is None:
        return None
    try:
        return store.deserialize_cdr(memoryview(data), typename)
    except Exception:
        return None


@cache
def _typestore() -> Any | None:
    try:
        from rosbags.typesys import Stores, get_typestore
    except ImportError:
        return None
    return get_typestore(Stores.LATEST)


@cache
def _converter() -> tuple[str, Converter]:
    """The library that converts encodings to rgb8: its name and its call."""
    try:
        # A cv_bridge that was built for another NumPy fails at import or at the first call, so it
        # is used only if it converts one pixel correctly.
        from cv_bridge import CvBridge

        bridge = CvBridge()

        def by_cv_bridge(message: Any) -> Any:
            return bridge.imgmsg_to_cv2(message, desired_encoding="rgb8")

        if np.array_equal(
            by_cv_bridge(_image(1, 1, "bgr8", 3, b"\xff\x80\x00")), [[[0, 128, 255]]]
        ):
            return "cv_bridge", by_cv_bridge
    except Exception:
        pass
    try:
        from rosbags.image import message_to_cvimage
    except ImportError as error:
        raise DecodeError(
            "no library for image encodings: install cv_bridge with ROS, "
            "or `pip install rosbags-image opencv-python-headless`"
        ) from error

    def by_rosbags(message: Any) -> Any:
        return message_to_cvimage(message, "rgb8")

    return "rosbags-image", by_rosbags


def _checked(decoded: Any, width: int, height: int, kind: str) -> ImageArray:
    """What a library returned, if it is what the header promises."""
    image = np.ascontiguousarray(decoded)
    if image.shape != (height, width, 3) or image.dtype != np.uint8:
        raise DecodeError(
            f"data: {kind} became {image.dtype}{list(image.shape)}, "
            f"its header promises uint8[{height}, {width}, 3]"
        )
    return image


def _known_encoding(encoding: str) -> tuple[int, str]:
    if encoding in _ENCODINGS:
        return _ENCODINGS[encoding]
    if any(part in encoding for part in _WIDE_ENCODING_PARTS):
        raise DecodeError(
            f"encoding: {_show(encoding)} is depth or more than 8 bits per channel; "
            "give the camera's 8-bit colour topic"
        )
    raise DecodeError(f"encoding: {_show(encoding)} is not known; known: {', '.join(_ENCODINGS)}")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width <= 0 or height <= 0:
        raise DecodeError(
            f"size: {width} × {height} pixels, both must be above 0; check the camera driver"
        )
    if width * height > max_pixels:
        raise DecodeError(
            f"size: {width} × {height} pixels is above the limit of {max_pixels}; "
            "lower the camera's resolution or raise the limit"
        )


def _byte_view(data: Any) -> NDArray[np.uint8]:
    """A flat view, without a copy, of bytes, array.array or a uint8 array."""
    view = memoryview(data)
    if view.itemsize == 1 and view.nbytes:
        return np.frombuffer(view, np.uint8)
    raise DecodeError(
        f"data: {type(data).__name__} with {view.nbytes} bytes of item size {view.itemsize}, "
        "must be bytes and not empty"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _show(value: Any, limit: int = 60) -> str:
    """One line for an error message, at most `limit` characters of any value."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[:limit] + "…"
