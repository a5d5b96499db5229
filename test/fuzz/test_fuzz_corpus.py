"""The fuzzers' corpus once more, and 10,000 messages made of its decoder inputs.

Fault pinned: an input that made a reader raise what it does not promise, allocate gigabytes or end
the process. What each target promises stands in `fuzz_targets.py`.
"""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from fuzz_checks import DATA, Target
from fuzz_targets import TARGETS

CORPUS = DATA / "fuzz"
MESSAGES = {"image": 4000, "compressed": 3000, "joints": 1500, "serialized": 1500}
NUMBERS = (0, 1, 255, 2**31 - 1, 2**32 - 1)
MAX_GROWTH_KB = 300_000


@pytest.fixture(scope="module")
def made() -> dict[str, Target]:
    return {}


def target(made: dict[str, Target], name: str) -> Target:
    if name not in made:
        made[name] = TARGETS[name]()
    return made[name]


def inputs(name: str) -> list[Path]:
    return sorted((CORPUS / name).iterdir())


def peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_is_borne(made: dict[str, Target], name: str) -> None:
    run, files = target(made, name), inputs(name)
    assert files
    before_kb = peak_kb()
    for file in files:
        try:
            run(file.read_bytes())
        except Exception as error:
            raise AssertionError(f"{file.relative_to(DATA)}: {error!r:.300}") from error
    assert peak_kb() - before_kb < MAX_GROWTH_KB


def mutated(rng: np.random.Generator, seeds: list[bytes]) -> bytes:
    """One of the seeds after one to four changes: bytes, numbers, cuts, repeats, another's end."""
    data = bytearray(seeds[rng.integers(len(seeds))])
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(data) + 1))
        kind = rng.integers(6)
        if kind == 0:
            data[at : at + 1] = rng.bytes(1)
        elif kind == 1:
            data[at : at + 4] = (
                rng.choice((0, 1, 255, 2**31 - 1, 2**32 - 1)).astype("<u4").tobytes()
            )
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + int(rng.integers(1, 9))]
        elif kind == 4:
            data[at:at] = data[at : at + int(rng.integers(1, 33))]
        else:
            data[at:] = seeds[rng.integers(len(seeds))][at:]
    return bytes(data[:8192])


@pytest.mark.parametrize("name", MESSAGES)
def test_any_message_is_a_result_or_the_documented_error(
    made: dict[str, Target], name: str
) -> None:
    """10,000 in all: random sizes, steps and encodings, cut and damaged JPEG and PNG."""
    run = target(made, name)
    seeds = [file.read_bytes() for file in inputs(name)]
    rng = np.random.default_rng(0)
    before_kb = peak_kb()
    for number in range(MESSAGES[name]):
        data = mutated(rng, seeds)
        try:
            run(data)
        except Exception as error:
            raise AssertionError(f"message {number}, {data[:200]!r}: {error!r:.300}") from error
    assert peak_kb() - before_kb < MAX_GROWTH_KB
