"""The training loop: stages, states to resume from, validation, evaluation, the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.training import checkpoints
from pi05_lab.training.config import ConfigError, StageConfig, TrainConfig
from pi05_lab.training.data import Batch, Examples, load_batches
from pi05_lab.training.losses import TrainModule, checkpoint_layers, choose_parameters
from pi05_lab.training.metrics import LOG_FILE, MetricsLogger
from pi05_lab.training.optim import AveragedWeights, learning_rate, make_optimizers
from pi05_lab.training.plugins import load_plugin
from pi05_lab.training.processes import Processes, open_processes
from pi05_lab.training.processing import start
from pi05_lab.training.validation import validate

CHECKPOINT = "checkpoint"
"""The folder under `output` that `Policy.from_pretrained` loads."""
SMOOTHING = 0.97
"""Of the running means."""

Evaluate = Callable[[Path], Mapping[str, float]]
"""A checkpoint's folder → closed-loop figures by name."""


def train(
    config: TrainConfig,
    evaluate: Evaluate | None = None,
    console: Console | None = None,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Run a training.

    Args:
        config: of the training.
        evaluate: called every `evaluation.every_minutes` and at the end.
        console: for the live table; None prints nothing.
        resume: continue from the state in `output`.
        stop: polled after every step; True saves the state and ends.

    Returns:
        The checkpoint's folder; None if it was stopped before the end.

    Raises:
        ConfigError: an unusable configuration, `output` has another training, or the gradient
            is not finite.
        DatasetError, CheckpointError: data or network cannot be read.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    output = Path(config.output).expanduser()
    if not resume and (output / checkpoints.STATE_FILE).is_file():
        raise ConfigError(
            f"{output} has a training: continue it with --resume, or give another output"
        )
    processes = open_processes(config)
    trainer = Trainer(config, output, processes, evaluate, stop)
    if resume:
        trainer.restore()
    if processes.is_main:
        output.mkdir(parents=True, exist_ok=True)
        checkpoints.write_config(output, config)
        kept = trainer.position.total_steps
        logger = MetricsLogger(output, console, config.tensorboard, kept)
    else:
        logger = MetricsLogger(None)
    with logger:
        done = trainer.run(logger)
    processes.close()
    return output / CHECKPOINT if done else None


class Trainer:
    """One training in one process."""

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        processes: Processes,
        evaluate: Evaluate | None,
        stop: Callable[[], bool],
    ) -> None:
        self.config = config
        self.output = output
        self.position = checkpoints.Position()
        self._processes = processes
        self._evaluate = evaluate
        self._stop = stop
        datasets = [LeRobotDataset(Path(d.root).expanduser()) for d in config.data.datasets]
        plugin = load_plugin(config)
        network, self._processor = start(config, datasets, plugin)
        torch.manual_seed(config.seed)
        losses = {name for stage in config.stages for name, w in stage.losses.items() if w > 0}
        auxiliary = None
        if plugin is not None and losses - {"flow"}:
            auxiliary = plugin.make_losses(config, self._processor, datasets, losses - {"flow"})
        self.examples = Examples(datasets, config, self._processor, auxiliary)
        if config.gradient_checkpointing:
            checkpoint_layers(network)
        self.module = TrainModule(network, auxiliary).to(processes.device)
        self.average = AveragedWeights(self.module)
        self._optimizers: list[torch.optim.Optimizer] = []
        self._restored: list[dict[str, Any]] = []
        # Running means of the stage, and all figures of its latest step.
        self._losses: dict[str, float] = {}
        self._times: dict[str, float] = {}
        self._figures: dict[str, float] = {}

    def restore(self) -> None:
        """Continue from the state in `output`; raises as `checkpoints.load_state`."""
        self.position, parts = checkpoints.load_state(self.output, self.config)
        self.module.load_state_dict(parts["module"])
        for name, value in parts["average"].items():
            self.average.shadow[name].copy_(value)
        self._restored = parts["optimizers"]

    def run(self, logger: MetricsLogger) -> bool:
        """Run the remaining stages; False if it was stopped."""
        for stage in self.config.stages[self.position.stage :]:
            if not self._run_stage(stage, logger):
                return False
        if self._processes.is_main:
            self._save_checkpoint()
            self._run_evaluation(logger)
            # again, with the evaluation's figures in the model card
            self._save_checkpoint()
        self._processes.wait()
        return True

    def _run_stage(self, stage: StageConfig, logger: MetricsLogger) -> bool:
        position, processes = self.position, self._processes
        parameters = choose_parameters(self.module, stage, self.config)
        if not parameters:
            raise ConfigError(
                f"stage {stage.name!r}: no parameter learns: check train, freeze_vision_encoder "
                "and train_expert_only"
            )
        self._optimizers = make_optimizers(parameters, stage)
        for optimizer, saved in zip(self._optimizers, self._restored, strict=False):
            optimizer.load_state_dict(saved)
        self._restored = []
        self._losses, self._times = {}, {}
        wrapped = processes.wrap(self.module)
        # batches are a function of seed, stage, process and step
        seed = (self.config.seed, position.stage, processes.rank)
        workers = self.config.data.workers
        with load_batches(self.examples, stage, seed, position.step, workers) as batches:
            while self._part(stage) < 1.0:
                self._step(stage, wrapped, batches)
                stopped = self._stop()
                if processes.is_main:
                    self._after_step(stage, logger, stopped)
                if stopped:
                    return False
        processes.release()
        self._end_stage(stage, logger)
        return True

    def _part(self, stage: StageConfig) -> float:
        """Completed part of the stage, 0 to 1."""
        if stage.steps is not None:
            return self.position.step / stage.steps if stage.steps else 1.0
        assert stage.minutes is not None
        return min(1.0, self.position.stage_s / (60 * stage.minutes))

    def _step(self, stage: StageConfig, wrapped: nn.Module, batches: Iterator[Batch]) -> None:
        position = self.position
        begin = time.perf_counter()
        batch = next(batches).to(self._processes.device)
        waited = time.perf_counter() - begin
        rate = learning_rate(stage, position.step, self._part(stage))
        with self._autocast():
            loss, losses = wrapped(batch, stage.losses, stage.insulate)
        self._processes.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), stage.clip)
        if not torch.isfinite(norm):
            raise ConfigError(
                f"stage {stage.name!r}, step {position.step}: the gradient is not finite; lower "
                "lr, or check the data for wrong values"
            )
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update(self.module, position.step, stage.ema)
        took = time.perf_counter() - begin
        position.step += 1
        position.total_steps += 1
        position.stage_s += took
        position.total_s += took
        _smooth(self._losses, {name: float(value) for name, value in losses.items()})
        pairs_per_s = len(batch.tokens) / took
        _smooth(self._times, {"step_s": took, "wait_s": waited, "pairs_per_s": pairs_per_s})
        self._figures = self._losses | self._times | {"lr": rate, "norm": float(norm)}

    def _after_step(self, stage: StageConfig, logger: MetricsLogger, stopped: bool) -> None:
        config, position = self.config, self.position
        logger.show_progress(stage.name, self._part(stage))
        if position.total_steps % config.log_steps == 0:
            figures = {"stage": stage.name, "minutes": round(position.total_s / 60, 3)}
            figures |= {name: float(f"{value:.5g}") for name, value in self._figures.items()}
            logger.write("train", position.total_steps, figures)
        if position.total_steps % config.validation.every_steps == 0:
            self._validate(stage, logger)
        every_s = 60 * config.evaluation.every_minutes
        if every_s and position.total_s - position.evaluated_s >= every_s:
            # saved first: the evaluation may fail
            self._save_state()
            self._save_checkpoint()
            self._run_evaluation(logger)
        if stopped or position.total_steps % config.checkpoint_steps == 0:
            self._save_state()

    def _end_stage(self, stage: StageConfig, logger: MetricsLogger) -> None:
        position = self.position
        self.average.copy_to(self.module)
        figures: dict[str, float] = {"steps": position.step, "minutes": position.stage_s / 60}
        figures |= dict(sorted(self._losses.items()))
        if self._processes.is_main:
            checked = self._validate(stage, logger)
            figures |= {f"held-out {name}": value for name, value in checked.items()}
            logger.write("stage", position.total_steps, {"stage": stage.name, **figures})
        position.summary[stage.name] = figures
        position.stage, position.step, position.stage_s = position.stage + 1, 0, 0.0
        self._optimizers = []
        if self._processes.is_main:
            self._save_state()

    def _validate(self, stage: StageConfig, logger: MetricsLogger) -> dict[str, float]:
        with self.average.applied_to(self.module), self._autocast():
            figures = validate(
                self.module, self.examples, stage.losses, self.config, self._processes.device
            )
        if figures:
            logger.write("validation", self.position.total_steps, figures)
        return figures

    def _run_evaluation(self, logger: MetricsLogger) -> None:
        self.position.evaluated_s = self.position.total_s
        if self._evaluate is None:
            return
        # loading a policy may set the number of threads of the whole process
        threads = torch.get_num_threads()
        try:
            figures = dict(self._evaluate(self.output / CHECKPOINT))
        finally:
            torch.set_num_threads(threads)
        logger.write("evaluation", self.position.total_steps, figures)

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self._processes.device.type, torch.bfloat16, enabled=enabled)

    def _save_state(self) -> None:
        parts = {
            "module": self.module.state_dict(),
            "average": self.average.shadow,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        checkpoints.save_state(self.output, self.config, self.position, parts)

    def _save_checkpoint(self) -> None:
        with self.average.applied_to(self.module):
            checkpoints.save_checkpoint(
                self.output / CHECKPOINT,
                self.module.network,
                self._processor,
                self.config,
                self.position,
                self.examples.counts(),
                self.output / LOG_FILE,
            )


def _smooth(means: dict[str, float], values: Mapping[str, float]) -> None:
    """Update running means in place; they begin at the first values."""
    for name, value in values.items():
        means[name] = SMOOTHING * means.get(name, value) + (1 - SMOOTHING) * value
