"""Images that mislead the network, injected through the running node's topics."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from fault_steps import level, shows, start_moving
from harness import Peer, default_image
from sensor_msgs.msg import Image

from pi05_ros.msg import PolicyStatus
from pi05_ros.nodes.messages import image_message

pytestmark = pytest.mark.slow

CAMERA = "cam_high"


def frozen(stamp_s: float) -> Image:
    return image_message(np.asarray(STUCK), stamp_s, CAMERA)


def black(stamp_s: float) -> Image:
    return image_message(np.zeros((48, 64, 3), np.uint8), stamp_s, CAMERA)


def deep(stamp_s: float) -> Image:
    image = default_image(CAMERA, stamp_s)
    image.encoding, image.step = "mono16", 128
    return image


STUCK = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (frozen, "camera 'cam_high': images are equal to the byte"),
        (black, "camera 'cam_high': "),
        (deep, "camera 'cam_high': encoding: 'mono16'"),
    ],
)
def test_images_that_mislead_are_a_warning_then_an_error_and_no_inference(
    peer: Peer, make: Callable[[float], Image], words: str
) -> None:
    """Pins: frozen, black and undecodable images with fresh stamps that were no problem."""

    def image(camera: str, stamp_s: float) -> Image:
        return make(stamp_s) if camera == CAMERA else default_image(camera, stamp_s)

    start_moving(peer)
    peer.make_image = image
    peer.wait(lambda: shows(peer, words), "problem of the camera")
    part = f"camera {CAMERA}"
    peer.wait(lambda: level(peer, part) == DiagnosticStatus.ERROR, "error of the camera")
    peer.wait(lambda: any(words in problem for problem in peer.statuses[-1].problems), "problem")
    time.sleep(0.5)
    peer.chunks.clear()
    time.sleep(0.3)
    assert not peer.chunks
    assert peer.statuses[-1].state == PolicyStatus.ACTIVE
    peer.make_image = default_image
    peer.wait(lambda: peer.chunks, "chunk from a true image")
    peer.wait(lambda: not shows(peer, words), "end of the problem")
