"""ACT, Diffusion Policy, π0 and π0.5 of a few million parameters, compared in one node.

    python benchmarks/policy_comparison/run.py ENVIRONMENT [--minutes 60] [--output runs/comparison]

All are trained from nothing on the same recordings of the simulated ALOHA for the same processor
time, ACT and Diffusion by LeRobot's trainer, and run in the node's runner with the same scheduler
and limits. ENVIRONMENT is a virtual environment with lerobot and this package, as
`test/external/run.sh ENVIRONMENT` makes it. A second call continues where the first one stopped.

On two cores: 7 minutes for the recordings, `--minutes` twice for the trainings (two at a time),
about 25 minutes for the episodes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pi05_lab.evaluation.closed_loop.summary import Rate

HERE = Path(__file__).resolve().parent
DELAYS_TICKS = (0, 2, 4, 8, 12, 20)
EPISODES = 100
DELAY_EPISODES = 30
CALIBRATION_STEPS = 20
CHUNK = 50
COMMON = (
    "--policy.discover_packages_path=policy_comparison", "--policy.device=cpu",
    "--policy.push_to_hub=false", "--policy.pretrained_backbone_weights=null",
    "--policy.vision_backbone=resnet18_narrow", "--batch_size=8", "--num_workers=0",
    "--wandb.enable=false", "--dataset.repo_id=local/comparison", "--log_freq=50",
)  # fmt: skip
LEROBOT = {
    "act": (
        "--policy.type=act", f"--policy.chunk_size={CHUNK}", f"--policy.n_action_steps={CHUNK}",
        "--policy.dim_model=128", "--policy.n_heads=4", "--policy.dim_feedforward=384",
        "--policy.optimizer_lr=1e-4", "--policy.optimizer_lr_backbone=1e-4",
    ),
    "diffusion": (
        "--policy.type=diffusion", "--policy.horizon=56", "--policy.n_action_steps=48",
        "--policy.crop_shape=null", "--policy.use_group_norm=true",
        "--policy.down_dims=[64,128,256]", "--policy.diffusion_step_embed_dim=64",
        "--policy.noise_scheduler_type=DDIM", "--policy.num_inference_steps=10",
    ),
}  # fmt: skip
FLOW = ("pi05", "pi0")
NAMES = {"act": "ACT", "diffusion": "Diffusion Policy", "pi0": "π0", "pi05": "π0.5"}


class Comparison:
    """The steps, each skipped if its result exists."""

    def __init__(self, environment: Path, output: Path, minutes: float, episodes: int) -> None:
        self.environment, self.output, self.minutes = environment, output, minutes
        self.episodes = episodes
        self.data = output / "data"

    def run(self, command: Sequence[str | Path], log: str) -> float:
        """Run a command on one thread; its processor time in minutes."""
        self.output.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join((str(HERE.parent), str(HERE.parents[1] / "examples")))
        variables = os.environ | {
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path,
        }  # fmt: skip
        with (self.output / f"{log}.log").open("ab") as file:
            process = subprocess.Popen(
                [str(word) for word in command], stdout=file, stderr=file, env=variables
            )
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{log} failed: see {self.output / log}.log")
        return (usage.ru_utime + usage.ru_stime) / 60

    def record(self) -> None:
        if not self.data.is_dir():
            self.run(
                [self.environment / "bin/pi05", "record", "--output", self.data, "--episodes",
                 "240", "--tasks", "touch", "--seed", "11", "--workers", "2"],
                "record",
            )  # fmt: skip

    def checkpoint(self, name: str) -> Path:
        if name in FLOW:
            return self.output / name / "checkpoint"
        return self.output / name / "checkpoints" / "last" / "pretrained_model"

    def train(self, name: str) -> None:
        done = self.output / f"{name}.json"
        if done.is_file():
            return
        if name in FLOW:
            minutes = self.run(
                [self.environment / "bin/pi05", "train", HERE / "flow.yaml", "--quiet",
                 "--output", self.output / name, "--data", self.data,
                 "--set", f"network.kind={name}", "--set", f"stages.0.minutes={self.minutes}"],
                name,
            )  # fmt: skip
        else:
            minutes = self.train_lerobot(name)
        done.write_text(json.dumps({"processor_minutes": minutes}))

    def train_lerobot(self, name: str) -> float:
        """LeRobot counts steps: a short run measures how many fit into the time."""

        def train(steps: int, folder: Path) -> float:
            return self.run(
                [self.environment / "bin/lerobot-train", *COMMON, *LEROBOT[name],
                 f"--dataset.root={self.data}", f"--output_dir={folder}", f"--steps={steps}",
                 f"--save_freq={steps}"],
                name,
            )  # fmt: skip

        start = train(1, self.output / f"{name}_start")
        some = train(1 + CALIBRATION_STEPS, self.output / f"{name}_some")
        per_step = max(some - start, 1e-3) / CALIBRATION_STEPS
        return train(round(self.minutes / per_step), self.output / name)

    def evaluate(self, name: str, ticks: int, episodes: int) -> dict[str, Any]:
        result = self.output / f"{name}_{ticks}.json"
        if not result.is_file():
            self.run(
                [self.environment / "bin/python", "-m", "policy_comparison.episodes",
                 self.checkpoint(name), result, str(ticks), str(episodes)],
                f"{name}_episodes",
            )  # fmt: skip
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, one row a policy."""
    lines = [
        "| | parameters, M | touched | wrong cube or arm first | ms a chunk | largest step, rad | "
        "RMS jerk, rad/s³ |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        rates = []
        for key in ("done", "wrong"):
            rate = Rate(result[key], result["episodes"])
            low, high = rate.interval or (0.0, 1.0)
            rates.append(f"{rate.count}/{rate.of} ({100 * low:.0f}–{100 * high:.0f} %)")
        lines.append(
            f"| {NAMES[name]} | {result['parameters'] / 1e6:.1f} | {rates[0]} | {rates[1]} | "
            f"{result['ms_per_chunk']:.0f} | {result['largest_step']:.3f} | {result['jerk']:.0f} |"
        )
    return "\n".join(lines)


def draw(delays: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Touches by delay with Wilson's intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, results in delays.items():
        rates = [Rate(result["done"], result["episodes"]) for result in results]
        shares = np.array([rate.count / rate.of for rate in rates])
        bounds = np.array([rate.interval for rate in rates], dtype=float)
        errors = np.abs(bounds.T - shares)
        x = 20 * np.array(DELAYS_TICKS)
        axes.errorbar(x, 100 * shares, 100 * errors, marker="o", capsize=3, label=NAMES[name])
    axes.set(xlabel="delay from an image to its usable chunk, ms", ylabel="touched, %")
    axes.set_ylim(-3, 103)
    axes.legend()
    figure.savefig(file, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environment", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0, help="of one core per policy")
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--episodes", type=int, default=EPISODES)
    parser.add_argument("--delay-episodes", type=int, default=DELAY_EPISODES)
    options = parser.parse_args()
    steps = Comparison(
        options.environment.absolute(), options.output.absolute(), options.minutes, options.episodes
    )
    started_s = time.monotonic()
    steps.record()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(steps.train, NAMES))
        results = dict(
            zip(
                NAMES,
                pool.map(lambda n: steps.evaluate(n, 8, options.episodes), NAMES),
                strict=True,
            )
        )
        best = sorted(NAMES, key=lambda name: -results[name]["done"])[:2]
        count = options.delay_episodes
        delays = {
            name: list(pool.map(lambda t, n=name: steps.evaluate(n, t, count), DELAYS_TICKS))
            for name in best
        }
    text = table(results)
    (options.output / "table.md").write_text(text + "\n")
    draw(delays, options.output / "delays.png")
    print(text)
    print(f"{(time.monotonic() - started_s) / 60:.0f} min; {options.output}/table.md, delays.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
