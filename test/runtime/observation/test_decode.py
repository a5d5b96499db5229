"""Faults pinned: headers with a wrong size, step or encoding; red and blue swapped by one of two
converters; padded rows; images that are bombs, cut short or 16 bit; sizes read from the wrong
place; memory and time that a small message claims; joints permuted, missing, doubled or not
finite."""

from __future__ import annotations

import array
import sys
import zlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pi05_ros.observation import decode
from pi05_ros.observation.decode import (
    DecodeError,
    ImageHeader,
    decode_image,
    decode_joint_state,
    read_image_header,
    stamp_s,
)
from pi05_ros.types import ImageArray

CONVERTERS = ["rosbags-image", "cv_bridge"]


CV_BRIDGE_CODES = {
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
    "yuv422": (2, cv2.COLOR_YUV2RGB_UYVY),
    "yuv422_yuy2": (2, cv2.COLOR_YUV2RGB_YUYV),
    "bayer_rggb8": (1, cv2.COLOR_BAYER_BG2RGB),
    "bayer_bggr8": (1, cv2.COLOR_BAYER_RG2RGB),
    "bayer_gbrg8": (1, cv2.COLOR_BAYER_GR2RGB),
    "bayer_grbg8": (1, cv2.COLOR_BAYER_GB2RGB),
}


class FakeCvBridge:
    """cv_bridge's call on cv2: whole-pixel steps, its own encoding names, a desired encoding."""

    calls = 0

    def imgmsg_to_cv2(self, img_msg: Any, desired_encoding: str = "passthrough") -> Any:
        assert desired_encoding == "rgb8" and img_msg.is_bigendian == 0
        type(self).calls += 1
        channels, code = CV_BRIDGE_CODES[img_msg.encoding]
        shape = (img_msg.height, img_msg.step // channels, channels)
        whole: ImageArray = np.ndarray(shape, np.uint8, buffer=img_msg.data)
        decoded = whole[:, : img_msg.width]
        return cv2.cvtColor(decoded.reshape(*decoded.shape[:2], channels), code)


def install_cv_bridge(monkeypatch: pytest.MonkeyPatch, bridge: type | None) -> None:
    module: Any = None
    if bridge is not None:
        module = ModuleType("cv_bridge")
        module.CvBridge = bridge
    monkeypatch.setitem(sys.modules, "cv_bridge", module)
    decode._converter.cache_clear()


@pytest.fixture(params=CONVERTERS)
def converter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    FakeCvBridge.calls = 0
    install_cv_bridge(monkeypatch, FakeCvBridge if request.param == "cv_bridge" else None)
    yield request.param
    decode._converter.cache_clear()


def image(pixels: np.ndarray, encoding: str, padding: int = 0, **fields: Any) -> SimpleNamespace:
    """A sensor_msgs/Image of pixels [height, width(, channels)]."""
    height, width = pixels.shape[:2]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (0, padding)), constant_values=77)
    message = SimpleNamespace(
        height=height, width=width, encoding=encoding, is_bigendian=0,
        step=rows.shape[1], data=array.array("B", rows.tobytes()),
    )  # fmt: skip
    vars(message).update(fields)
    return message


def rgb_pixels(height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, np.full_like(pixels[..., :1], 9)], axis=-1)


@pytest.mark.parametrize("padding", [0, 3, 5])
@pytest.mark.parametrize(
    ("encoding", "swapped", "alpha"),
    [
        ("rgb8", False, False),
        ("bgr8", True, False),
        ("8UC3", True, False),
        ("rgba8", False, True),
        ("bgra8", True, True),
        ("8UC4", True, True),
    ],
)
def test_colour_encodings_become_rgb(
    converter: str, encoding: str, swapped: bool, alpha: bool, padding: int
) -> None:
    rgb = rgb_pixels()
    sent = rgb[..., ::-1] if swapped else rgb
    result = decode_image(image(with_alpha(sent) if alpha else sent, encoding, padding))
    np.testing.assert_array_equal(result, rgb)
    assert result.dtype == np.uint8 and result.flags.c_contiguous
    assert decode._converter()[0] == converter
    assert (FakeCvBridge.calls > 0) == (converter == "cv_bridge")


@pytest.mark.parametrize("encoding", ["mono8", "8UC1"])
def test_grey_becomes_three_equal_channels(converter: str, encoding: str) -> None:
    grey = rgb_pixels()[..., 0]
    result = decode_image(image(grey, encoding, padding=2))
    np.testing.assert_array_equal(result, np.repeat(grey[..., None], 3, axis=-1))


@pytest.mark.parametrize(
    ("encoding", "order"),
    [("yuv422", "UYVY"), ("uyvy", "UYVY"), ("yuv422_yuy2", "YUYV"), ("yuyv", "YUYV")],
)
def test_yuv_uses_the_byte_order_of_its_name(converter: str, encoding: str, order: str) -> None:
    """Pure red in BT.601 video range is Y 81, U 90, V 240."""
    component = {"Y": 81, "U": 90, "V": 240}
    pair = np.array([component[letter] for letter in order], np.uint8).reshape(1, 2, 2)
    result = decode_image(image(np.tile(pair, (4, 3, 1)), encoding)).astype(int)
    assert result.shape == (4, 6, 3)
    np.testing.assert_allclose(result, np.broadcast_to([255, 0, 0], result.shape), atol=3)


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_pattern_is_read_from_its_name(converter: str, pattern: str) -> None:
    """The four letters are the colours of the top left 2 × 2 pixels, row by row."""
    colour = {"r": 200, "g": 120, "b": 40}
    cell = np.array([colour[letter] for letter in pattern], np.uint8).reshape(2, 2)
    result = decode_image(image(np.tile(cell, (4, 4)), f"bayer_{pattern}8"))
    np.testing.assert_array_equal(result[2:-2, 2:-2], np.full((4, 4, 3), [200, 120, 40]))


def test_byte_order_flag_does_not_matter_for_bytes(converter: str) -> None:
    pixels = rgb_pixels()
    result = decode_image(image(pixels[..., ::-1], "bgr8", is_bigendian=1))
    np.testing.assert_array_equal(result, pixels)


def test_tight_rgb8_is_a_view_of_the_message() -> None:
    message = image(rgb_pixels(), "rgb8")
    result = decode_image(message)
    assert np.shares_memory(result, np.frombuffer(message.data, np.uint8))
    padded = image(rgb_pixels(), "rgb8", padding=1)
    assert not np.shares_memory(decode_image(padded), np.frombuffer(padded.data, np.uint8))


@pytest.mark.parametrize("container", [bytes, bytearray, memoryview, np.array])
def test_any_byte_buffer_is_accepted(container: Any) -> None:
    message = image(rgb_pixels(), "rgb8")
    message.data = container(message.data)
    np.testing.assert_array_equal(decode_image(message), rgb_pixels())


@pytest.mark.parametrize("fault", ["raises", "swaps nothing"])
def test_a_broken_cv_bridge_is_not_used(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Its compiled part fails at the first call where it was built for another NumPy."""

    class Broken:
        def imgmsg_to_cv2(self, img_msg: Any, desired_encoding: str = "passthrough") -> Any:
            if fault == "raises":
                raise AttributeError("_ARRAY_API not found")
            return np.frombuffer(img_msg.data, np.uint8).reshape(img_msg.height, -1, 3)

    install_cv_bridge(monkeypatch, Broken)
    assert decode._converter()[0] == "rosbags-image"
    decode._converter.cache_clear()


@pytest.mark.parametrize("fault", ["raises", "another size", "another type"])
def test_a_converter_error_is_a_decode_error(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    class Bad(FakeCvBridge):
        def imgmsg_to_cv2(self, img_msg: Any, desired_encoding: str = "passthrough") -> Any:
            decoded = super().imgmsg_to_cv2(img_msg, desired_encoding)
            if img_msg.width == 1:  # the one pixel that it is tried with
                return decoded
            if fault == "raises":
                raise RuntimeError("OpenCV:\nassertion failed")
            return decoded[:-1] if fault == "another size" else decoded.astype(np.float32)

    install_cv_bridge(monkeypatch, Bad)
    with pytest.raises(DecodeError) as error:
        decode_image(image(rgb_pixels(), "bgr8"))
    expected = "could not be decoded (RuntimeError: OpenCV: assertion" if fault == "raises" else (
        "its header promises uint8[6, 8, 3]")  # fmt: skip
    assert expected in str(error.value) and "\n" not in str(error.value)
    decode._converter.cache_clear()


def test_no_converter_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cv_bridge(monkeypatch, None)
    monkeypatch.setitem(sys.modules, "rosbags.image", None)
    with pytest.raises(DecodeError, match="pip install rosbags-image"):
        decode_image(image(rgb_pixels(), "bgr8"))
    decode._converter.cache_clear()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "size: 0 × 6 pixels, both must be above 0"),
        ({"height": -1}, "size: 8 × -1 pixels, both must be above 0"),
        ({"height": None}, "the image could not be decoded (TypeError: "),
        ({"encoding": 3}, "the image could not be decoded (TypeError: "),
        ({"width": 2.5}, "the image could not be decoded (TypeError: "),
        ({"step": 23}, "step: 23 is below 24"),
        ({"step": 10**5000}, "the image could not be decoded (ValueError: "),
        ({"height": 7}, "data: 144 bytes, step 24 × height 7 needs 168"),
        ({"data": b""}, "data: bytes with 0 bytes"),
        ({"data": [1, 2, 3]}, "the image could not be decoded (TypeError: "),
        ({"data": np.zeros(144, np.float32)}, "item size 4"),
        ({"encoding": "nv12"}, "encoding: 'nv12' is not known; known: rgb8"),
        ({"encoding": "16UC1"}, "encoding: '16UC1' is depth or more than 8 bits"),
        ({"encoding": "32FC1"}, "encoding: '32FC1' is depth or more than 8 bits"),
        ({"encoding": "rgb16"}, "encoding: 'rgb16' is depth or more than 8 bits"),
        ({"encoding": "yuyv", "width": 7}, "width: 7 is odd"),
    ],
)
def test_a_bad_image_is_refused_by_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DecodeError) as error:
        decode_image(image(rgb_pixels(), **{"encoding": "rgb8", **fields}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_message_without_the_fields_is_refused() -> None:
    with pytest.raises(DecodeError, match="object has no attribute 'height'"):
        decode_image(SimpleNamespace())


def test_the_pixel_limit_is_checked_before_the_data() -> None:
    message = image(rgb_pixels(), "rgb8", width=100_000, height=100_000)
    with pytest.raises(DecodeError, match="100000 × 100000 pixels is above the limit"):
        decode_image(message)
    with pytest.raises(DecodeError, match="above the limit of 47"):
        decode_image(image(rgb_pixels(), "rgb8"), max_pixels=47)
    assert decode_image(image(rgb_pixels(), "rgb8"), max_pixels=48).shape == (6, 8, 3)


def compressed(data: bytes, name: str = "jpeg") -> SimpleNamespace:
    return SimpleNamespace(format=name, data=array.array("B", data))


def encoded(pixels: np.ndarray, extension: str, *options: int) -> bytes:
    return bytes(cv2.imencode(extension, pixels, options)[1])


def smooth_rgb() -> np.ndarray:
    """An image that JPEG preserves: red falls to the right, blue rises downwards."""
    down, right = np.mgrid[0:32, 0:48]
    return np.stack([250 - 5 * right, np.full_like(down, 60), 5 * down], axis=-1).astype(np.uint8)


def test_compressed_images_become_rgb() -> None:
    rgb = smooth_rgb()
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    png = decode_image(compressed(encoded(bgr, ".png"), "rgb8; png compressed bgr8"))
    np.testing.assert_array_equal(png, rgb)
    jpeg = decode_image(compressed(encoded(bgr, ".jpg"), "rgb8; jpeg compressed bgr8"))
    assert np.abs(jpeg.astype(int) - rgb).max() <= 12
    assert jpeg.shape == rgb.shape and jpeg.flags.c_contiguous


def test_grey_and_transparent_images_have_three_channels() -> None:
    grey = smooth_rgb()[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=-1)
    np.testing.assert_array_equal(decode_image(compressed(encoded(grey, ".png"))), expected)
    assert np.abs(decode_image(compressed(encoded(grey, ".jpg"))).astype(int) - expected).max() < 12
    bgra = with_alpha(np.ascontiguousarray(smooth_rgb()[..., ::-1]))
    np.testing.assert_array_equal(decode_image(compressed(encoded(bgra, ".png"))), smooth_rgb())


def png_chunk(kind: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + crc


def test_a_png_bomb_is_refused_by_its_header() -> None:
    """A hundred bytes that claim 30 GB."""
    size = (100_000).to_bytes(4, "big")
    header = png_chunk(b"IHDR", size + size + bytes([8, 2, 0, 0, 0]))
    body = png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    with pytest.raises(DecodeError, match="100000 × 100000 pixels is above the limit"):
        decode_image(compressed(b"\x89PNG\r\n\x1a\n" + header + body))


def test_a_jpeg_bomb_is_refused_by_its_header() -> None:
    data = bytearray(encoded(smooth_rgb(), ".jpg"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(DecodeError, match="65535 × 65535 pixels is above the limit"):
        decode_image(compressed(bytes(data)))


@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_an_image_cut_short_is_refused_at_any_length(extension: str) -> None:
    data = encoded(smooth_rgb(), extension)
    for length in range(0, len(data) - 20, 7):
        with pytest.raises(DecodeError):
            decode_image(compressed(data[:length]))


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (encoded(np.zeros((4, 4), np.uint16), ".png"), "png", "16 bits per channel"),
        (encoded(smooth_rgb(), ".png"), "16UC1; compressedDepth png", "is a depth image"),
        (b"\x00\x00\x00\x01\x67", "h264", "neither JPEG nor PNG; publish one of them (format 'h2"),
        (b"", "jpeg", "data: array with 0 bytes"),
    ],
)
def test_compressed_messages_without_a_colour_image_are_refused(
    data: bytes, name: str, message: str
) -> None:
    with pytest.raises(DecodeError) as error:
        decode_image(compressed(data, name))
    assert message in str(error.value)


FIELD_VALUES = (
    st.integers(-5, 70)
    | st.integers()
    | st.none()
    | st.floats()
    | st.text(max_size=5)
    | st.just(24)
)
ENCODINGS = st.sampled_from([*decode._ENCODINGS, "16UC1", "nv21", "", "rgb8\n"]) | FIELD_VALUES
DATA = st.binary(max_size=300) | st.binary(min_size=600, max_size=600) | FIELD_VALUES


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    height=st.integers(1, 9) | FIELD_VALUES,
    width=st.integers(1, 9) | FIELD_VALUES,
    step=st.integers(1, 40) | FIELD_VALUES,
    encoding=ENCODINGS,
    data=DATA,
    big=st.integers(0, 1),
)
def test_any_image_header_is_decoded_or_a_decode_error(
    height: Any, width: Any, step: Any, encoding: Any, data: Any, big: int
) -> None:
    message = SimpleNamespace(
        height=height, width=width, step=step, encoding=encoding, data=data, is_bigendian=big
    )
    try:
        decoded = decode_image(message, max_pixels=1000)
    except DecodeError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert decoded.shape == (height, width, 3) and decoded.dtype == np.uint8


JPEG, PNG = encoded(smooth_rgb(), ".jpg"), encoded(smooth_rgb(), ".png")


@settings(max_examples=200, deadline=None)
@given(
    data=st.sampled_from([JPEG, PNG]),
    edits=st.lists(st.tuples(st.integers(0, len(JPEG) - 1), st.integers(0, 255)), max_size=6),
    cut=st.none() | st.integers(0, len(JPEG)),
)
def test_a_damaged_image_is_decoded_or_a_decode_error(
    data: bytes, edits: list[tuple[int, int]], cut: int | None
) -> None:
    damaged = bytearray(data)
    for at, value in edits:
        damaged[at % len(damaged)] = value
    try:
        decoded = decode_image(compressed(bytes(damaged[:cut])), max_pixels=10_000)
    except DecodeError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert decoded.dtype == np.uint8 and decoded.shape[2] == 3 and decoded.size <= 30_000


NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def test_size_and_depth_are_read() -> None:
    assert read_image_header(encoded(NOISE, ".jpg")) == ImageHeader("JPEG", 40, 24, 8)
    progressive = encoded(NOISE, ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    assert read_image_header(progressive) == ImageHeader("JPEG", 40, 24, 8)
    assert read_image_header(encoded(NOISE, ".png")) == ImageHeader("PNG", 40, 24, 8)
    assert read_image_header(encoded(NOISE.astype(np.uint16), ".png")).bits == 16


def test_segments_before_the_frame_header_are_skipped() -> None:
    """An Exif segment may contain a frame header: its thumbnail's."""
    thumbnail = b"\xff\xc0\x00\x11\x08\x00\x01\x00\x01"
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    jpeg = encoded(NOISE, ".jpg")
    padded = jpeg[:2] + segment + b"\xff" + jpeg[2:]
    assert read_image_header(padded) == ImageHeader("JPEG", 40, 24, 8)


@pytest.mark.parametrize(("extension", "first", "spared"), [(".jpg", 3, 1), (".png", 8, 8)])
def test_every_cut_image_is_refused(extension: str, first: int, spared: int) -> None:
    whole = encoded(NOISE, extension)
    for length in range(first, len(whole) - spared):
        with pytest.raises(ValueError, match="cut short"):
            read_image_header(whole[:length])


@pytest.mark.parametrize("raw", [b"", b"\xff\xd8", b"GIF89a", b"RIFF", encoded(NOISE, ".bmp")])
def test_other_formats_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="neither JPEG nor PNG"):
        read_image_header(raw)


def test_a_scan_before_the_frame_header_is_refused() -> None:
    with pytest.raises(ValueError, match="without a frame header"):
        read_image_header(b"\xff\xd8\xff\xda" + bytes(20) + encoded(NOISE, ".jpg"))


def test_a_png_chunk_that_does_not_fit_is_refused() -> None:
    """Pins: OpenCV allocates what a chunk claims, 2 GB for an 8 × 8 image of 141 bytes."""
    png = encoded(NOISE[:8, :8], ".png")
    for chunk in (b"IDAT", b"IEND"):
        at = png.index(chunk) - 4
        for length in (len(png), 0x7FFFFFFF, 0xFFFFFFAA):
            with pytest.raises(ValueError, match="without its end"):
                read_image_header(png[:at] + length.to_bytes(4, "big") + png[at + 4 :])


def test_a_jpeg_of_too_many_scans_is_refused() -> None:
    """Pins: minutes of decoding for a message of a megabyte."""
    jpeg = encoded(NOISE, ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    repeats = 100 - jpeg.count(b"\xff\xda")
    assert read_image_header(jpeg[:-2] + repeats * last + jpeg[-2:]).width == 40
    with pytest.raises(ValueError, match="101 scans"):
        read_image_header(jpeg[:-2] + (repeats + 1) * last + jpeg[-2:])


def joint_state(names: Any, positions: Any) -> SimpleNamespace:
    return SimpleNamespace(name=names, position=positions)


@given(
    order=st.permutations(["waist", "shoulder", "elbow", "gripper", "left_finger"]),
    wanted=st.permutations(["waist", "shoulder", "elbow", "gripper"]),
)
def test_joints_are_found_by_name_in_any_order(order: list[str], wanted: list[str]) -> None:
    value = {"waist": 0.1, "shoulder": -0.2, "elbow": 0.3, "gripper": 0.04, "left_finger": 9.0}
    message = joint_state(order, array.array("d", [value[name] for name in order]))
    result = decode_joint_state(message, wanted)
    assert result.dtype == np.float64
    assert result.tolist() == [value[name] for name in wanted]


@pytest.mark.parametrize(
    ("names", "positions", "message"),
    [
        (["a"], [1.0], "joint 'b' is missing"),
        (["a", "b", "a"], [1.0, 2.0, 1.0], "joint 'a' is given twice"),
        (["a", "b"], [1.0, float("nan")], "joint 'b' is nan"),
        (["a", "b"], [float("-inf"), 1.0], "joint 'a' is -inf"),
        (["a", "b"], [1.0], "1 values for 2 names, joint 'b' has none"),
        (["a", "b"], [1.0, 2.0, 3.0], "2 names for 3 positions, none after joint 'b'"),
        (["a", "b"], [], "0 values for 2 names, joint 'a' has none"),
        ([], [1.0], "0 names for 1 positions"),
        (["a", 5], [1.0, 2.0], "joint 'b' is missing"),
        (["a", "b"], [[1.0], [2.0]], "position: 2 dimensions"),
        (["a", "b"], ["x", "y"], "the joint state could not be decoded (ValueError: "),
        (None, [1.0], "the joint state could not be decoded (TypeError: "),
    ],
)
def test_a_bad_joint_state_names_the_joint(names: Any, positions: Any, message: str) -> None:
    with pytest.raises(DecodeError) as error:
        decode_joint_state(joint_state(names, positions), ["a", "b"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_joints_may_be_nan() -> None:
    message = joint_state(["a", "x"], [1.0, float("nan")])
    assert decode_joint_state(message, ["a"]).tolist() == [1.0]


def header(sec: Any, nanosec: Any) -> SimpleNamespace:
    return SimpleNamespace(stamp=SimpleNamespace(sec=sec, nanosec=nanosec))


def test_stamp_is_in_seconds() -> None:
    assert stamp_s(header(12, 250_000_000)) == 12.25
    assert stamp_s(header(1_760_000_000, 999_999_999)) == pytest.approx(1_760_000_001, abs=1e-6)


@pytest.mark.parametrize("bad", [header(1, 10**9), header(1, -1), header("1", 0), header(None, 0)])
def test_a_bad_stamp_is_refused(bad: Any) -> None:
    with pytest.raises(DecodeError):
        stamp_s(bad)
    with pytest.raises(DecodeError, match="no attribute 'stamp'"):
        stamp_s(SimpleNamespace())
