"""Fuzz targets: what comes over topics."""

from __future__ import annotations

import math
import struct
from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
from fuzz_checks import MAX_PIXELS, Target, check_error, check_picture, folder


def image() -> Target:
    """sensor_msgs/Image: 16 bytes choose the fields, the rest are the pixels."""
    from pi05_ros.observation.decode import _ENCODINGS, DecodeError, decode_image

    encodings = [*_ENCODINGS, "16UC1", "32FC1", "", "rgb8; compressed", "8UC9", "\0", None, 7]
    small = (0xFF, 0xFFFF, 0xFFFFFFFF, 0x3F)

    def run(data: bytes) -> None:
        if len(data) < 16:
            return
        height, width, step, encoding, reach, holder, repeat = struct.unpack("<IIIBBBB", data[:16])
        mask = small[reach % 4]
        height, width = height & mask, width & mask
        step = step & mask if reach & 4 else width * (1 + reach // 64)
        pixels: Any = data[16:]
        if repeat and len(pixels):
            pixels = (pixels * (repeat * 64))[: 1 << 20]
        if holder % 8 == 1:
            pixels = bytearray(pixels)
        elif holder % 8 == 2:
            pixels = array("B", pixels)
        elif holder % 8 == 3:
            pixels = np.frombuffer(pixels, np.uint8)
        elif holder % 8 == 4:
            pixels = array("H", pixels[: len(pixels) // 2 * 2])
        elif holder % 8 == 5:
            pixels = list(pixels[:64])
        message = SimpleNamespace(
            height=height,
            width=width,
            step=step,
            encoding=encodings[encoding % len(encodings)],
            is_bigendian=holder >> 7,
            data=pixels,
        )
        try:
            picture = decode_image(message, max_pixels=MAX_PIXELS)
        except DecodeError as error:
            check_error(error)
        else:
            check_picture(picture)
            assert picture.shape[:2] == (height, width)

    return run


def compressed() -> Target:
    """sensor_msgs/CompressedImage: one byte chooses the format's name, the rest are the data."""
    from pi05_ros.observation.decode import DecodeError, decode_image

    formats = ("jpeg", "png", "rgb8; jpeg compressed bgr8", "16UC1; compressedDepth png", "", None)

    def run(data: bytes) -> None:
        if not data:
            return
        message = SimpleNamespace(format=formats[data[0] % len(formats)], data=data[1:])
        try:
            picture = decode_image(message, max_pixels=MAX_PIXELS)
        except DecodeError as error:
            check_error(error)
        else:
            check_picture(picture)

    return run


def serialized() -> Target:
    """What the node's raw subscriptions get: CDR, as it came over the network."""
    from sensor_msgs.msg import CompressedImage, Image, JointState
    from std_msgs.msg import String

    from pi05_ros.nodes.messages import decode_stored_image, deserialize, serialized_stamp_s

    def run(data: bytes) -> None:
        if not data:
            return
        raw = data[1:]
        message_type = (Image, CompressedImage, JointState, String)[data[0] % 4]
        try:
            if message_type in (JointState, String):
                assert isinstance(deserialize(raw, message_type), message_type)
                return
            assert math.isfinite(serialized_stamp_s(raw))
            picture = decode_stored_image((message_type, raw))
        except ValueError as error:
            check_error(error)
        else:
            assert picture.dtype == np.uint8 and picture.shape[2] == 3

    return run


def joints() -> Target:
    """sensor_msgs/JointState: per joint a byte for its name and eight for its position."""
    from pi05_ros.observation.decode import DecodeError, decode_joint_state

    wanted = ("waist", "elbow", "gripper")
    names = (*wanted, "", "wrist\n", "x" * 500, "\ud800", 3, None)

    def run(data: bytes) -> None:
        if not data:
            return
        count, body = data[0] % 8, data[1:]
        positions = struct.unpack(f"<{len(body) // 9}d", body[: len(body) // 9 * 8])
        chosen = [names[byte % len(names)] for byte in body[len(body) // 9 * 8 :]]
        message = SimpleNamespace(
            name=chosen[: len(positions)] if count else chosen,
            position=positions if count != 1 else [*positions, "1.5", None, 10**400],
        )
        try:
            values = decode_joint_state(message, wanted)
        except DecodeError as error:
            check_error(error)
        else:
            assert values.shape == (3,) and values.dtype == np.float64
            assert np.isfinite(values).all()

    return run


def instruction() -> Target:
    """std_msgs/String: one byte is the limit, the rest the text; then the prompt made of it."""
    from small_policy.tokenizer import vocabulary_size, write_tokenizer

    from pi05_ros.observation.instruction import InstructionError, checked_instruction
    from pi05_ros.policy.prompt import PromptTokenizer, pi05_prompt

    place = folder()
    write_tokenizer(place)
    tokenizer = PromptTokenizer.from_directory(place, 48, vocabulary_size())

    def run(data: bytes) -> None:
        if not data:
            return
        limit = 1 + data[0]
        text = data[1:].decode("utf-8", "surrogatepass" if data[0] & 1 else "replace")
        try:
            accepted = checked_instruction(text, limit)
        except InstructionError as error:
            check_error(error)
            return
        assert 0 < len(accepted) <= limit and accepted == accepted.strip()
        assert accepted.isprintable() or not accepted.isascii()
        tokens = tokenizer.encode(pi05_prompt(accepted, np.zeros(2)))
        assert len(tokens.ids) == len(tokens.mask) == 48

    def guarded(data: bytes) -> None:
        try:
            run(data)
        except UnicodeDecodeError as error:  # of this target: no String has such bytes
            assert error.object == data[1:]

    return guarded


def urdf() -> Target:
    """A URDF from the topic robot_description."""
    from pi05_ros.control.urdf import UrdfError, read_urdf_limits

    def run(data: bytes) -> None:
        try:
            limits = read_urdf_limits(data.decode("utf-8", "replace"), ["waist"])
        except UrdfError as error:
            check_error(error)
            return
        joint = limits["waist"]
        assert joint.lower < joint.upper
        assert joint.max_velocity > 0 and joint.max_acceleration > 0

    return run
