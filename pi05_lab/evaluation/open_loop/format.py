"""Numbers as the report shows them; what is not known is a dash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def three(values: Sequence[float | None]) -> tuple[str, ...]:
    shown = [number(value, 1) for value in values]
    return tuple((shown + ["–"] * 3)[:3])


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def span(pair: Sequence[float | None] | None) -> str:
    if pair is None or None in pair:
        return "–"
    return f"{pair[0]:.3f}–{pair[1]:.3f}"


def change(figures: Mapping[str, Any] | None) -> str:
    if figures is None or figures["share"] is None:
        return "–"
    text = f"{100 * figures['share']:+.0f} %"
    pair = figures["share_95"]
    if pair is not None and None not in pair:
        text += f" ({100 * pair[0]:+.0f} to {100 * pair[1]:+.0f})"
    return text


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.0f}"
