"""What reads untrusted input, one function each: bytes in, an assertion about what came of them.

Each target is made by a function that imports its reader. Whatever the bytes, a reader returns a
result of which the target checks the shape and size, or raises its one documented error; anything
else that escapes is a fault of the reader. `test/fuzz/fuzz.py` looks for such bytes, guided by
coverage; the tests replay those that it found and mutations of them.
"""

from __future__ import annotations

from collections.abc import Callable

from fuzz_checks import Target
from fuzz_files import config, description, orbax, params, processing, safetensors, shards
from fuzz_messages import compressed, image, instruction, joints, serialized, urdf

TARGETS: dict[str, Callable[[], Target]] = {
    make.__name__: make
    for make in (
        image,
        compressed,
        serialized,
        joints,
        instruction,
        safetensors,
        shards,
        config,
        processing,
        description,
        params,
        orbax,
        urdf,
    )
}
