"""Fault pinned: a policy normalises by statistics that are not those of its data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pi05_lab.data.statistics import QUANTILES, ImageHistogram, vector_statistics


@settings(max_examples=50, deadline=None)
@given(
    arrays(
        np.float32,
        array_shapes(min_dims=1, max_dims=3, max_side=6),
        elements=st.floats(-1e3, 1e3, width=32),
    )
)
def test_vectors_have_numpys_statistics(values: np.ndarray) -> None:
    found = vector_statistics(values)
    rows = values.reshape(-1, 1 if values.ndim == 1 else values.shape[-1]).astype(np.float64)
    assert found["count"].tolist() == [len(values)]
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(found[name], getattr(rows, name)(axis=0), atol=1e-9)
    for name, q in QUANTILES.items():
        np.testing.assert_allclose(found[name], np.quantile(rows, q, axis=0), atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(arrays(np.uint8, (2, 3, 3)), min_size=1, max_size=4), st.integers(0, 4))
def test_images_have_numpys_statistics_also_after_a_merge(
    images: list[np.ndarray], split: int
) -> None:
    first, second = ImageHistogram(), ImageHistogram()
    for k, image in enumerate(images):
        (first if k < split else second).add(image)
    first.merge(second)
    found = first.statistics()
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255.0
    assert found["count"].tolist() == [len(images)]
    for name in ("min", "max", "mean", "std"):
        expected = getattr(pixels, name)(axis=0).reshape(3, 1, 1)
        np.testing.assert_allclose(found[name], expected, atol=1e-7)
    for name, q in QUANTILES.items():
        expected = np.quantile(pixels, q, axis=0).reshape(3, 1, 1)
        np.testing.assert_allclose(found[name], expected, atol=1e-9)


def test_no_data_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="no data"):
        vector_statistics(np.empty((0, 3)))
    with pytest.raises(ValueError, match="no images"):
        ImageHistogram().statistics()
