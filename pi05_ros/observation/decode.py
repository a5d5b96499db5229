"""sensor_msgs Image, CompressedImage and JointState become arrays.

Any object with the message's fields will do: rclpy's messages, those that rosbags reads from a
recording, a namespace in a test. A message is checked before a library sees it, because a header
that lies about its size is read past its end otherwise, and a picture of a few kilobytes can ask
for gigabytes.

Size and depth of a JPEG or PNG from its first bytes, before a decoder allocates for them.

Serialized messages, as a raw subscription gets them and a recording holds them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pi05_ros.types import FloatArray, ImageArray

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


def read_in_place(data: bytes, typename: str) -> Any | None:
    """A message of a CDR stream; its arrays are views of `data`.

    Args:
        data: with the encapsulation; anybody may have written it.
        typename: as "sensor_msgs/msg/Image".

    Returns:
        None for what rosbags' reader does not take, which need not be wrong: it counts bytes behind
        the last field otherwise than some middlewares. None too in a ROS installation without it.
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


DEFAULT_MAX_PIXELS = 4096 * 2160

# Encoding → (bytes per pixel, the name that both converters know). 8UC3 and 8UC4 come from OpenCV
# programs, whose order is blue first; RViz and Foxglove read them so too.
_ENCODINGS = {
    "rgb8": (3, "rgb8"),
    "bgr8": (3, "bgr8"),
    "8UC3": (3, "bgr8"),
    "rgba8": (4, "rgba8"),
    "bgra8": (4, "bgra8"),
    "8UC4": (4, "bgra8"),
    "mono8": (1, "mono8"),
    "8UC1": (1, "mono8"),
    "yuv422": (2, "yuv422"),
    "uyvy": (2, "yuv422"),
    "yuv422_yuy2": (2, "yuv422_yuy2"),
    "yuyv": (2, "yuv422_yuy2"),
    "bayer_rggb8": (1, "bayer_rggb8"),
    "bayer_bggr8": (1, "bayer_bggr8"),
    "bayer_gbrg8": (1, "bayer_gbrg8"),
    "bayer_grbg8": (1, "bayer_grbg8"),
}
_YUV_BYTES_PER_PIXEL = 2
_LARGEST_FIELD = 2**32 - 1
_WIDE_ENCODING_PARTS = ("16", "32", "64", "8S")

Converter = Callable[[Any], Any]


class DecodeError(ValueError):
    """A message that cannot be used; one line names the field, its value and the remedy."""


def decode_image(message: Any, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> ImageArray:
    """Turn a sensor_msgs Image or CompressedImage (told by its `format`) into a picture.

    Eight-bit colour and grey encodings, 4:2:2 YUV and Bayer patterns are converted; depth and
    16-bit pictures are refused. `is_bigendian` says nothing about single bytes and is not read.

    rgb8 without padding is not copied: the picture is a view of the message's bytes, writable
    where they are. Whoever decodes a message gives its bytes away and must not alter them after.
    Every other picture owns its memory.

    Args:
        message: Has `width`, `height`, `encoding`, `step`, `data`; or `format` and `data`.
        max_pixels: Larger pictures are refused before anything is decoded.

    Returns:
        RGB, uint8 [height, width, 3], contiguous.

    Raises:
        DecodeError: For every message that is no such picture.
    """
    if hasattr(message, "format"):
        return _decode_compressed(message, max_pixels)
    height, width = _positive(message, "height"), _positive(message, "width")
    _check_size(width, height, max_pixels)
    bytes_per_pixel, encoding = _known_encoding(_field(message, "encoding"))
    if bytes_per_pixel == _YUV_BYTES_PER_PIXEL and width % 2:
        raise DecodeError(f"width: {width} is odd, {encoding} shares colour between two pixels")
    row_bytes = width * bytes_per_pixel
    step = _positive(message, "step")
    if step < row_bytes:
        raise DecodeError(
            f"step: {step} is below {row_bytes}, the bytes of {width} pixels in {encoding}; "
            "correct step, width or encoding in the camera driver"
        )
    data = _byte_view(_field(message, "data"))
    if data.size < step * height:
        raise DecodeError(
            f"data: {data.size} bytes, step {step} × height {height} needs {step * height}; "
            "the message was cut short or its header is wrong"
        )
    rows = data[: step * height].reshape(height, step)[:, :row_bytes]
    rows = np.ascontiguousarray(rows)
    if encoding == "rgb8":
        return rows.reshape(height, width, 3)
    # rosbags-image ignores step and cv_bridge only takes steps of whole pixels, so both get tight
    # rows; and byte order is settled here, since cv_bridge swaps with a call NumPy 2 dropped.
    tight = SimpleNamespace(
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=0,
        step=row_bytes,
        data=rows.reshape(-1),
    )
    return _checked(lambda: _converter()[1](tight), width, height, encoding)


def image_converter() -> str:
    """Load the library that converts encodings and name it: "cv_bridge" or "rosbags-image".

    The first picture would pay for the import otherwise.

    Raises:
        DecodeError: If neither is installed.
    """
    return _converter()[0]


def decode_joint_state(message: Any, names: Sequence[str]) -> FloatArray:
    """Positions [len(names)] of a sensor_msgs JointState in the order of `names`.

    Joints are found by name: the message may order them differently and carry more of them.

    Raises:
        DecodeError: Naming the joint that is missing, given twice, without a position or whose
            position is not a finite number.
    """
    received = list(_iterable(_field(message, "name"), "name"))
    try:
        position = np.asarray(_field(message, "position"), dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DecodeError(f"position: not a list of numbers ({_one_line(error)})") from error
    if position.ndim != 1:
        raise DecodeError(f"position: {position.ndim} dimensions, must be one number per joint")
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
        if not isinstance(name, str):
            raise DecodeError(f"name: entry {i} is {_show(name)}, not text")
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


def stamp_s(header: Any) -> float:
    """Seconds of a std_msgs Header's `stamp`.

    A double has a quarter of a microsecond left at today's epoch.
    """
    stamp = _field(header, "stamp")
    seconds, nanoseconds = _integer(stamp, "sec"), _integer(stamp, "nanosec")
    if not 0 <= nanoseconds < 1_000_000_000:
        raise DecodeError(f"nanosec: {nanoseconds} is not within one second")
    return seconds + nanoseconds * 1e-9


def _decode_compressed(message: Any, max_pixels: int) -> ImageArray:
    declared = _field(message, "format")
    if isinstance(declared, str) and "compressedDepth" in declared:
        raise DecodeError(f"format: {_show(declared)} is a depth picture, use the colour topic")
    data = _byte_view(_field(message, "data"))
    try:
        header = read_picture_header(data.tobytes())
    except ValueError as error:
        raise DecodeError(f"data: {error} (format {_show(declared)})") from error
    if header.bits > 8:
        raise DecodeError(
            f"data: {header.kind} with {header.bits} bits per channel is no 8-bit colour picture; "
            "give the camera's colour topic"
        )
    _check_size(header.width, header.height, max_pixels)

    def decode() -> Any:
        import cv2

        # Both converters call imdecode too, without the flags that make grey, palette and
        # transparent pictures three channels and keep a camera's orientation tag out.
        bgr = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if bgr is None:
            raise DecodeError(f"data: the {header.kind} is damaged")
        return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)

    return _checked(decode, header.width, header.height, header.kind)


@cache
def _converter() -> tuple[str, Converter]:
    """The library that turns any known encoding into rgb8: its name and its call."""
    try:
        # A ROS installation's cv_bridge is compiled code that may fail to import or, built for
        # another NumPy, at its first use: it is trusted after one pixel came out right.
        from cv_bridge import CvBridge

        bridge = CvBridge()

        def by_cv_bridge(message: Any) -> Any:
            return bridge.imgmsg_to_cv2(message, desired_encoding="rgb8")

        blue = SimpleNamespace(
            height=1, width=1, encoding="bgr8", is_bigendian=0, step=3, data=b"\xff\x80\x00"
        )
        if np.array_equal(by_cv_bridge(blue), [[[0, 128, 255]]]):
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


def _checked(decode: Callable[[], Any], width: int, height: int, kind: str) -> ImageArray:
    """Run a library's decoder; whatever it raises or returns, only a picture gets out."""
    try:
        picture = np.ascontiguousarray(decode())
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(f"data: {kind} could not be decoded ({_one_line(error)})") from error
    if picture.shape != (height, width, 3) or picture.dtype != np.uint8:
        raise DecodeError(
            f"data: {kind} became {picture.dtype}{list(picture.shape)}, "
            f"its header promises uint8[{height}, {width}, 3]"
        )
    return picture


def _known_encoding(encoding: Any) -> tuple[int, str]:
    if isinstance(encoding, str):
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
        raise DecodeError(f"size: {width} × {height} pixels, both must be above 0")
    if width * height > max_pixels:
        raise DecodeError(
            f"size: {width} × {height} pixels is above the limit of {max_pixels}; "
            "lower the camera's resolution or raise the limit"
        )


def _byte_view(data: Any) -> NDArray[np.uint8]:
    """A flat view, without a copy, of bytes, array.array or a uint8 array."""
    try:
        view = memoryview(data)
        if view.itemsize == 1 and view.nbytes:
            return np.frombuffer(view, np.uint8)
    except (TypeError, ValueError, BufferError):
        raise DecodeError(f"data: {type(data).__name__} is not a run of bytes") from None
    raise DecodeError(
        f"data: {type(data).__name__} with {view.nbytes} bytes of item size {view.itemsize}, "
        "must be bytes and not empty"
    )


def _field(message: Any, name: str) -> Any:
    try:
        return getattr(message, name)
    except AttributeError:
        raise DecodeError(f"{name}: {type(message).__name__} has no such field") from None


def _iterable(value: Any, name: str) -> Any:
    try:
        return iter(value)
    except TypeError:
        raise DecodeError(f"{name}: {_show(value)} is not a list") from None


def _integer(message: Any, name: str) -> int:
    value = _field(message, name)
    try:
        number = operator.index(value)
    except TypeError:
        raise DecodeError(f"{name}: {_show(value)} is not a whole number") from None
    if abs(number) > _LARGEST_FIELD:
        raise DecodeError(f"{name}: more than 32 bits, no message holds that")
    return number


def _positive(message: Any, name: str) -> int:
    value = _integer(message, name)
    if value <= 0:
        raise DecodeError(f"{name}: {value}, must be above 0; check the camera driver")
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _show(value: Any, limit: int = 60) -> str:
    """A value for an error: one line, cut, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= limit else text[:limit] + "…"
