"""Serialized messages, as a raw subscription gets them and a recording holds them."""

from __future__ import annotations

from functools import cache
from typing import Any


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
