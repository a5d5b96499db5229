"""How regularly the recorded topics came."""

from __future__ import annotations

from typing import Any

import numpy as np

from pi05_lab.evaluation.open_loop.series import Decimated, Samples, percentiles, rounded

GAP_PERIODS = 3.0
"""A pause of more than so many usual periods is a gap."""
_FIRST = 20
_WORST = 5


class StreamStatistics:
    """One topic: rate, pauses, transport."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.count = 0
        self._first_s = self.last_s = 0.0
        self._steps_s = Samples()
        self._ages_s = Decimated()
        self._typical_s = 0.0
        self._gaps: list[tuple[float, float]] = []
        self._gap_count = 0
        self._late = 0

    def add(self, stamp_s: float, received_s: float) -> None:
        if self.count == 0:
            self._first_s = stamp_s
        else:
            self._step(stamp_s - self.last_s)
        self.count += 1
        self.last_s = max(stamp_s, self.last_s) if self.count > 1 else stamp_s
        self._ages_s.add(received_s - stamp_s)

    def _step(self, step_s: float) -> None:
        if step_s <= 0:
            self._late += 1
            return
        self._steps_s.add(step_s)
        if self._steps_s.count <= _FIRST:
            self._typical_s = float(np.median(self._steps_s.items))
        if self._steps_s.count >= _FIRST and step_s > GAP_PERIODS * self._typical_s:
            self._gap_count += 1
            self._gaps.append((step_s, self.last_s))
            self._gaps = sorted(self._gaps, reverse=True)[:_WORST]

    def to_dict(self, start_s: float, end_s: float) -> dict[str, Any]:
        """Figures; times count from `start_s`, silence up to `end_s`."""
        span_s = self.last_s - self._first_s
        steps_s = self._steps_s
        periods_s = percentiles(steps_s.items, (50, 99))
        if steps_s.count:
            periods_s.append(steps_s.largest)
        return {
            "topic": self.topic,
            "messages": self.count,
            "rate_hz": round((self.count - 1) / span_s, 3) if span_s > 0 else 0.0,
            "period_ms": rounded([1e3 * v for v in periods_s], 3),
            "age_ms": rounded([1e3 * v for v in percentiles(self._ages_s.items)], 3),
            "gaps": self._gap_count,
            "longest_gaps": [
                [round(1e3 * gap_s, 1), round(at_s - start_s, 3)] for gap_s, at_s in self._gaps
            ],
            "out_of_order": self._late,
            "first_s": round(self._first_s - start_s, 3),
            "silent_s": round(max(0.0, end_s - self.last_s), 3),
        }
