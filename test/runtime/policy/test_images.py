"""Pictures for the network; faults: the other stack's resampling, grey padding, wrong scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from pi05_ros.policy.images import (
    EMPTY,
    ImageError,
    ImageLoader,
    fitted_size,
    prepare_image,
    prepare_on_device,
)
from pi05_ros.policy.processing import Convention

DATA = Path(__file__).parents[2] / "data" / "processing"


def stored_image(name: str) -> np.ndarray:
    return np.asarray(Image.open(DATA / f"{name}.png"))


@pytest.mark.parametrize("name", ["small", "tall", "vga"])
def test_resizes_as_lerobot(name: str) -> None:
    """Fault: antialiasing, which LeRobot does not do."""
    got = prepare_image(stored_image(name), 224, "lerobot")
    expected = load_file(DATA / "lerobot_rows.safetensors")[name]
    assert got.shape == (3, 224, 224) and got.dtype == torch.float32
    torch.testing.assert_close(got.permute(1, 2, 0)[::8], expected, rtol=0, atol=1e-6)


def plain_pillow(image: np.ndarray) -> np.ndarray:
    """openpi's resize with padding, by the Pillow that is installed: [224, 224, 3] of 0 to 255."""
    height, width = image.shape[:2]
    ratio = max(width / 224, height / 224)
    inner = (int(width / ratio), int(height / ratio))
    padded = Image.new("RGB", (224, 224))
    resized = Image.fromarray(image).resize(inner, Image.Resampling.BILINEAR)
    padded.paste(resized, ((224 - inner[0]) // 2, (224 - inner[1]) // 2))
    return np.asarray(padded).astype(np.float64)


@pytest.mark.parametrize("name", ["small", "tall", "vga"])
def test_resizes_as_openpi(name: str) -> None:
    """Fault: resampling in floats; openpi's rounds to bytes. One step of a byte is tolerated."""
    got = prepare_image(stored_image(name), 224, "openpi")
    expected = stored_image(f"{name}_openpi").astype(np.float64) / 255 * 2 - 1
    np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), expected, atol=2 / 255 + 1e-6)
    np.testing.assert_allclose(
        got.permute(1, 2, 0).numpy(), plain_pillow(stored_image(name)) / 255 * 2 - 1, atol=1e-6
    )
    # Pillow 13 rounds differently from 10 to 12, the newest for Python 3.10: the stored images
    # agree with 13, and with the others to one step of a byte.
    if int(PIL.__version__.split(".")[0]) >= 13:
        assert np.isclose(got.permute(1, 2, 0).numpy(), expected, atol=1e-6).mean() > 0.999


@pytest.mark.parametrize("convention", ["lerobot", "openpi"])
def test_an_image_of_the_right_size_is_only_scaled(convention: Convention) -> None:
    """Fault: a resample that blurs what already fits."""
    ramp = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
    got = prepare_image(ramp, 12, convention)
    expected = torch.from_numpy(ramp).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("convention", ["lerobot", "openpi"])
def test_the_odd_padding_pixel_is_at_the_end(convention: Convention) -> None:
    """Fault: padding of 0 (grey) or -3, or the image one pixel off."""
    white = np.full((5, 10, 3), 255, dtype=np.uint8)
    got = prepare_image(white, 10, convention)
    assert (got[:, 2:7] == 1).all()
    assert (got[:, :2] == -1).all() and (got[:, 7:] == -1).all()


@pytest.mark.parametrize("convention", ["lerobot", "openpi"])
@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), value=st.integers(0, 255))
def test_any_size_stays_in_range(
    convention: Convention, height: int, width: int, value: int
) -> None:
    """Fault: a very thin image fitted to a size of 0, or values outside [-1, 1]."""
    got = prepare_image(np.full((height, width, 3), value, dtype=np.uint8), 32, convention)
    assert got.shape == (3, 32, 32)
    assert got.min() >= -1 and got.max() <= 1
    rows, columns = fitted_size(height, width, 32)
    assert max(rows, columns) == 32 and min(rows, columns) >= 1
    assert got[0, 15, 15] == pytest.approx(value / 255 * 2 - 1, abs=1e-5)


@pytest.mark.parametrize("convention", ["lerobot", "openpi"])
@pytest.mark.parametrize("shape", [(480, 640, 3), (97, 61, 3), (40, 64, 3), (64, 64, 3)])
def test_preparation_on_a_gpu_is_the_same(
    convention: Convention, shape: tuple[int, int, int]
) -> None:
    """Fault: another resampling where the images are prepared on the device.

    openpi's rounds to bytes twice, the device once: one step of a byte apart.
    """
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    got = prepare_on_device(torch.from_numpy(image), 64, convention)
    bound = 1e-5 if convention == "lerobot" else 2 / 255 + 1e-5
    torch.testing.assert_close(got, prepare_image(image, 64, convention), rtol=0, atol=bound)


def test_each_image_goes_into_its_row() -> None:
    """Fault: rows shifted where a camera is missing; the error does not say which image."""
    loader = ImageLoader(8, "lerobot", torch.device("cpu"))
    white, grey = (np.full((8, 8, 3), value, np.uint8) for value in (255, 51))
    into = torch.full((3, 3, 8, 8), EMPTY)
    stages: list[str] = []
    loader.load({2: white, 0: grey}, into, stages.append)
    assert into[:, 0, 0, 0].tolist() == pytest.approx([-0.6, -1.0, 1.0])
    assert stages == ["upload", "resize"]
    with pytest.raises(ImageError, match="needs uint8") as caught:
        loader.load({0: grey, 1: white.astype(np.float32)}, into, stages.append)  # type: ignore
    assert caught.value.index == 1


def test_views_and_read_only_arrays() -> None:
    """Fault: a mirrored view, or the read-only buffer of a message, is not accepted."""
    image = stored_image("small")
    flipped = image[:, ::-1]
    flipped.flags.writeable = False
    copy = np.ascontiguousarray(flipped)
    for convention in ("lerobot", "openpi"):
        got = prepare_image(flipped, 64, convention)
        torch.testing.assert_close(got, prepare_image(copy, 64, convention))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8.*float32"),
        (np.zeros((4, 4), np.uint8), r"\[height, width, 3\], got \[4, 4\]"),
        (np.zeros((3, 4, 4), np.uint8), r"got \[3, 4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), r"got \[4, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got \[0, 4, 3\]"),
        ([[1]], "uint8.*list"),
    ],
)
def test_other_arrays_are_refused(image: np.ndarray, message: str) -> None:
    """Fault: floats of 0-1 taken for bytes, channels first taken for a thin image."""
    with pytest.raises(ValueError, match=message):
        prepare_image(image, 8, "lerobot")
