"""Simulator and policy node under load, with faults at random.

    python test/soak/soak.py [--minutes 30] [--seed 0] [--checkpoint small] [--output soak_out]

Three cameras at 30 Hz. Every few seconds a fault fires: a camera stops; joints arrive permuted,
with a duplicate name or with wrong readings; the policy raises, returns NaN, sleeps or hangs;
hundreds of instructions arrive; `~/stop` is called; `scheduler.*` changes in motion; a controller
unsubscribes for some ms or for 1 s; a second publisher appears or is killed; the drives are off, as
at an emergency stop; the simulator is killed and restarted; the policy node is stalled, killed or
ended by SIGTERM.

First each fault fires once, then at random. Faults that restart the policy node fire in the first
round and again after the last memory sample: growth is measured in one process.

Every trajectory is checked: limits, the motion at chunk boundaries, a first point no later
than its arrival. Prints a Markdown report. The exit code is 1 if a process ended or raised, SIGTERM
gave another exit code than 0, a check failed, a fault was not recovered from or not in the status,
or if after the first round memory grew by 2 % or more, or threads or files by more than one. A run
of less than 2.5 minutes after the first round is too short to measure memory and fails.

The policy node is `faulty_policy_node.py`. Joint states and trajectories go through this process
(`soak_watcher.py`); the simulator's topics are remapped to `sim/`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from soak_faults import Faults
from soak_memory import Sample
from soak_processes import Processes
from soak_report import Outcome, report
from soak_watcher import Watcher

from pi05_lab.demo.ros_domain import use_own_domain
from pi05_ros.nodes.main import prepare

WARM_UP_SHARE = 0.1
"""Share of the run before memory is measured, if the first round of faults is over by then."""
SAMPLE_S = 1.0
LAST_RESTARTS = 3
"""Rounds of the faults that restart the policy node, after the last memory sample."""


def sampled(processes: Processes, samples: list[Sample], done: threading.Event) -> None:
    """Fill `samples` with the policy node's memory until `done`."""
    while not done.wait(SAMPLE_S):
        with contextlib.suppress(OSError):
            samples.append(processes.sample("node"))


def any_of(names: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Random names, endlessly."""
    while True:
        yield rng.choice(names)


def soak(processes: Processes, minutes: float, seed: int) -> Outcome | None:
    """Run with faults; None if the arms do not move at the start."""
    rng = random.Random(seed)
    began_s = time.monotonic()
    for name in ("sim", "node"):
        processes.start(name)
    watcher = Watcher()
    faults = Faults(processes, watcher, rng)
    if not faults.wait_for_motion(began_s):
        return None
    samples: list[Sample] = []
    ended: set[str] = set()
    done = threading.Event()
    sampler = threading.Thread(target=sampled, args=(processes, samples, done), daemon=True)
    sampler.start()
    restarts = [name for name, fault in faults.faults.items() if fault.restarts]
    others = [name for name in faults.faults if name not in restarts]

    def fire(names: Iterable[str]) -> Iterator[None]:
        for name in names:
            faults.fire(name)
            ended.update(processes.ended())
            yield
            time.sleep(rng.uniform(1.0, 3.0))

    # Restarts first: the first round of the others is the warm-up of the remaining process.
    for _ in fire([*restarts, *rng.sample(others, len(others))]):
        pass
    round_s = time.monotonic()
    for _ in fire(any_of(others, rng)):
        if time.monotonic() - began_s >= 60.0 * minutes:
            break
    done.set()
    sampler.join()
    for _ in fire(restarts * LAST_RESTARTS):
        pass
    return Outcome(
        minutes,
        watcher.trajectories,
        watcher.boundaries,
        watcher.violations,
        ended=sorted(ended),
        lost=faults.lost,
        unreported=faults.unreported,
        exit_codes=faults.exit_codes,
        recovery_s=faults.recovery_s,
        resumed=faults.resumed,
        samples=samples,
        settled_s=max(round_s, began_s + 60.0 * minutes * WARM_UP_SHARE),
    )


def write_samples(path: Path, outcome: Outcome) -> None:
    names = [field.name for field in dataclasses.fields(Sample)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "settled"])
        for sample in outcome.samples:
            row = [round(value, 3) for value in dataclasses.astuple(sample)]
            writer.writerow([*row, int(sample.at_s >= outcome.settled_s)])


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Simulator and node under load, with faults.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", default="small")
    parser.add_argument("--output", type=Path, default=Path("soak_out"))
    options = parser.parse_args(args)
    options.output.mkdir(parents=True, exist_ok=True)
    use_own_domain()
    prepare()
    processes = Processes(options.output, options.checkpoint)
    try:
        outcome = soak(processes, options.minutes, options.seed)
    finally:
        processes.stop()
    if outcome is None:
        print(f"the arms do not move, see {options.output}")
        return 1
    outcome.tracebacks = processes.tracebacks()
    write_samples(options.output / "memory.csv", outcome)
    text, well = report(outcome)
    print(text)
    (options.output / "soak.md").write_text(text + "\n", encoding="utf-8")
    return int(not well)


if __name__ == "__main__":
    raise SystemExit(main())
