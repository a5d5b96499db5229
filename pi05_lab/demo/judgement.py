"""Whether the arms did what each instruction of the demo asked for, from the recorded states."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from pi05_lab.demo.report import DemoRecord
from pi05_lab.sim.arms import SimulatedAloha
from pi05_lab.sim.judge import Judge
from pi05_lab.sim.tasks import parse


@dataclass(frozen=True)
class Outcome:
    """What became of one instruction until the next one, or the end of the run."""

    text: str
    known: bool
    """The judge knows the task; other instructions are carried out unjudged."""
    done_after_s: float | None
    wrong: bool
    """Another cube or the other arm was there before."""
    given_s: float
    """How long the instruction stood."""
    changed: bool = False
    """Another instruction came after it."""

    def __str__(self) -> str:
        if not self.known:
            return "no task that can be judged"
        if self.done_after_s is None:
            when = "when changed after" if self.changed else "in"
            result = f"not done {when} {self.given_s:.1f} s"
        else:
            result = f"done after {self.done_after_s:.1f} s"
        return result + (", after another cube or arm" if self.wrong else "")


def judge_run(record: DemoRecord) -> list[Outcome]:
    """One outcome per instruction, by the criteria of `sim.judge.Judge`."""
    if not record.qpos_s:
        return []
    sim = SimulatedAloha()
    ends_s = [start_s for start_s, _ in record.instructions[1:]] + [record.qpos_s[-1] + 1e-6]
    starts = [*record.instructions, (ends_s[-1], "")]
    return [
        _judge(record, sim, text, start_s, end_s, changed=bool(following))
        for (start_s, text), (end_s, following) in pairwise(starts)
    ]


def _judge(
    record: DemoRecord,
    sim: SimulatedAloha,
    text: str,
    start_s: float,
    end_s: float,
    changed: bool,
) -> Outcome:
    task = parse(text)
    judge: Judge | None = None
    for stamp_s, qpos in zip(record.qpos_s, record.qpos, strict=True):
        if task is None or not start_s <= stamp_s < end_s:
            continue
        sim.set_qpos(qpos)
        sim.data.time = stamp_s - start_s
        if judge is None:
            judge = Judge(task, sim)
        judge.update()
    return Outcome(
        text,
        known=task is not None,
        done_after_s=None if judge is None else judge.done_at_s,
        wrong=judge is not None and judge.wrong,
        given_s=end_s - start_s,
        changed=changed,
    )
