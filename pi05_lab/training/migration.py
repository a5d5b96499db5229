"""A π0 checkpoint becomes the start of a π0.5.

Both have the same PaliGemma and the same matrices of the expert. π0.5 has no state token, an MLP of
the time alone, and norms that the time modulates. Those begin as in openpi's initialisation: a
modulation of 0, so every layer of the expert begins as the identity.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from pi05_lab.training.config import ConfigError
from pi05_ros.policy.checkpoint import load_model
from pi05_ros.policy.config import DEFAULT_NORMALIZATION, DEFAULT_TOKEN_LENGTH, read_config
from pi05_ros.policy.model import Pi0

_REASONS = {
    "state_proj": "π0.5 reads the state from the prompt",
    "action_time_mlp": "mixes action and time; π0.5's MLP has the time alone",
    "experts.action": "plain norms; π0.5's have no weights of their own",
    "time_mlp": "random",
    "experts.action.modulation": "0: the expert's layers begin as the identity",
}


class Row(NamedTuple):
    """What became of one part of the network."""

    part: str
    what: str
    """taken, fresh or dropped."""
    parameters: int
    why: str


def migrate(path: Path) -> tuple[Pi0, list[Row]]:
    """π0.5 from a π0 checkpoint, and a row for each part that was taken, is fresh or was dropped.

    Fresh values are random as torch's generator says, where the row says so.

    Raises:
        ConfigError: the checkpoint is no π0.
        CheckpointError: see `load_model`.
    """
    config = read_config(path)
    if config.kind != "pi0":
        raise ConfigError(f"network.kind: pi05 is for a π0 checkpoint, {path} is π0.5 already")
    raw = {key: value for key, value in config.raw.items() if key != "type"}
    network = Pi0(
        replace(
            config,
            kind="pi05",
            token_length=DEFAULT_TOKEN_LENGTH["pi05"],
            normalization_mapping=dict(DEFAULT_NORMALIZATION["pi05"]),
            raw=raw,
        )
    )
    theirs = dict(load_model(path, "cpu", torch.float32).named_parameters())
    rows: dict[tuple[str, str], Row] = {}

    def note(name: str, what: str, count: int) -> None:
        part = _part(name)
        before = rows.get((part, what), Row(part, what, 0, _reason(name, what)))
        rows[part, what] = before._replace(parameters=before.parameters + count)

    with torch.no_grad():
        for name, parameter in network.named_parameters():
            source = theirs.pop(name, None)
            if source is not None and source.shape == parameter.shape:
                parameter.copy_(source)
                note(name, "taken", parameter.numel())
            else:
                note(name, "fresh", parameter.numel())
    for name, source in theirs.items():
        note(name, "dropped", source.numel())
    return network, list(rows.values())


def _part(name: str) -> str:
    for part in ("experts.vlm", "experts.action.modulation", "experts.action"):
        if name.startswith(part):
            return part
    return name.split(".")[0]


def _reason(name: str, what: str) -> str:
    known = [part for part in _REASONS if name.startswith(part) and what != "taken"]
    return _REASONS[max(known, key=len)] if known else ""


def table(rows: list[Row]) -> str:
    """A Markdown table of the rows."""
    lines = ["| part | | parameters | |", "|---|---|---|---|"]
    lines += [f"| {r.part} | {r.what} | {r.parameters:,} | {r.why} |" for r in rows]
    return "\n".join(lines)
