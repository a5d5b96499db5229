"""The training loop: stages, states to resume from, validation, evaluation, the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import nn

from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.training import checkpoints
from pi05_lab.training.config import ConfigError, StageConfig, TrainConfig
from pi05_lab.training.data import Examples, Loader
from pi05_lab.training.losses import TrainModule, checkpoint_layers, choose_parameters
from pi05_lab.training.metrics import LOG_FILE, MetricsLogger
from pi05_lab.training.optim import AveragedWeights, learning_rate, make_optimizers
from pi05_lab.training.plugins import load_plugin
from pi05_lab.training.processes import Processes
from pi05_lab.training.processing import start
from pi05_lab.training.validation import averaged, validate

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
        evaluate: closed-loop evaluation, called with the checkpoint's folder every
            `evaluation.every_minutes` and at the end.
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
    if not resume and checkpoints.has_state(output):
        raise ConfigError(
            f"{output} has a training: continue it with --resume, or give another output"
        )
    processes = Processes(config)
    trainer = Trainer(config, output, processes, evaluate, stop)
    if resume:
        trainer.restore()
    kept = trainer.position.total_steps
    shown = console if processes.is_main else None
    directory = None
    if processes.is_main:
        output.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        (output / checkpoints.CONFIG_FILE).write_text(text, encoding="utf-8")
        directory = output
    with MetricsLogger(directory, shown, config.tensorboard, kept) as logger:
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
        self.average = AveragedWeights(self.module, 0.0)
        self._optimizers: list[torch.optim.Optimizer] = []
        self._restored: dict[str, Any] = {}

    def restore(self) -> None:
        """Continue from the state in `output`.

        Raises:
            ConfigError: there is none, or it is of another configuration.
        """
        self.position, parts = checkpoints.load_state(self.output, self.config)
        self.module.load_state_dict(parts["module"])
        for name, value in parts["average"].items():
            self.average.shadow[name].copy_(value)
        self._restored = parts

    def run(self, logger: MetricsLogger) -> bool:
        """Run the remaining stages; False if it was stopped."""
        while self.position.stage < len(self.config.stages):
            stage = self.config.stages[self.position.stage]
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
        for optimizer, saved in zip(
            self._optimizers, self._restored.pop("optimizers", []), strict=False
        ):
            optimizer.load_state_dict(saved)
        self.average.decay = stage.ema
        wrapped = processes.wrap(self.module)
        logger.clear()
        meter = _Meter()
        # batches are a function of seed, stage, process and step
        seed = (self.config.seed, position.stage, processes.rank)
        with Loader(self.examples, stage, seed, position.step, self.config.data.workers) as loader:
            while self._part(stage) < 1.0:
                self._step(stage, wrapped, parameters, loader, meter)
                stopped = self._stop()
                self._after_step(stage, logger, meter, stopped)
                if stopped:
                    return False
        processes.release()
        self._end_stage(stage, logger, meter)
        return True

    def _part(self, stage: StageConfig) -> float:
        """Completed part of the stage, 0 to 1."""
        if stage.steps is not None:
            return self.position.step / stage.steps if stage.steps else 1.0
        assert stage.minutes is not None
        return min(1.0, self.position.stage_s / (60 * stage.minutes))

    def _step(
        self,
        stage: StageConfig,
        wrapped: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        loader: Loader,
        meter: _Meter,
    ) -> None:
        position = self.position
        begin = time.perf_counter()
        batch = loader.next().to(self._processes.device)
        waited = time.perf_counter() - begin
        rate = learning_rate(stage, position.step, self._part(stage))
        with self._autocast():
            loss, losses = wrapped(batch, stage.losses, stage.insulate)
        self._processes.backward(loss)
        norm = nn.utils.clip_grad_norm_(parameters.values(), stage.clip)
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
        self.average.update(self.module, position.step)
        took = time.perf_counter() - begin
        position.step += 1
        position.total_steps += 1
        position.stage_s += took
        position.total_s += took
        meter.add(losses, rate, float(norm), took, waited, len(batch.tokens))

    def _after_step(
        self, stage: StageConfig, logger: MetricsLogger, meter: _Meter, stopped: bool
    ) -> None:
        config, position = self.config, self.position
        if not self._processes.is_main:
            return
        logger.progress(stage.name, self._part(stage))
        if position.total_steps % config.log_steps == 0:
            figures = {"stage": stage.name, "minutes": round(position.total_s / 60, 3)}
            logger.write("train", position.total_steps, figures | meter.figures())
        if position.total_steps % config.validation.every_steps == 0:
            self._validate(stage, logger)
        every_s = 60 * config.evaluation.every_minutes
        if every_s and position.total_s - position.evaluated_s >= every_s:
            # saved first: the evaluation may fail
            self._save_state([optimizer.state_dict() for optimizer in self._optimizers])
            self._save_checkpoint()
            self._run_evaluation(logger)
        if stopped or position.total_steps % config.checkpoint_steps == 0:
            self._save_state([optimizer.state_dict() for optimizer in self._optimizers])

    def _end_stage(self, stage: StageConfig, logger: MetricsLogger, meter: _Meter) -> None:
        position = self.position
        self.average.copy_to(self.module)
        figures: dict[str, float] = {"steps": position.step, "minutes": position.stage_s / 60}
        figures |= {name: meter.losses[name] for name in sorted(meter.losses)}
        if self._processes.is_main:
            checked = self._validate(stage, logger)
            figures |= {f"held-out {name}": value for name, value in checked.items()}
            logger.write("stage", position.total_steps, {"stage": stage.name, **figures})
        position.summary[stage.name] = figures
        position.stage, position.step, position.stage_s = position.stage + 1, 0, 0.0
        if self._processes.is_main:
            self._save_state([])

    def _validate(self, stage: StageConfig, logger: MetricsLogger) -> dict[str, float]:
        settings = self.config.validation
        with averaged(self.module, self.average), self._autocast():
            figures = validate(
                self.module,
                self.examples,
                stage.losses,
                settings.frames,
                self.config.seed,
                self._processes.device,
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

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self._processes.device.type, torch.bfloat16, enabled=enabled)

    def _save_state(self, optimizers: list[dict[str, Any]]) -> None:
        parts = {
            "module": self.module.state_dict(),
            "average": self.average.shadow,
            "optimizers": optimizers,
        }
        checkpoints.save_state(self.output, self.config, self.position, parts)

    def _save_checkpoint(self) -> None:
        with averaged(self.module, self.average):
            checkpoints.save_checkpoint(
                self.output / CHECKPOINT,
                self.module.network,
                self._processor,
                self.config,
                self.position,
                self.examples.counts(),
                self.output / LOG_FILE,
            )


class _Meter:
    """Running means of losses and times."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def add(
        self,
        losses: Mapping[str, torch.Tensor],
        rate: float,
        norm: float,
        took_s: float,
        waited_s: float,
        rows: int,
    ) -> None:
        for name, loss in losses.items():
            old = self.losses.get(name, float(loss))
            self.losses[name] = SMOOTHING * old + (1 - SMOOTHING) * float(loss)
        new = {"step_s": took_s, "wait_s": waited_s, "pairs_per_s": rows / took_s}
        for name, value in new.items():
            old = self._last.get(name, value)
            self._last[name] = SMOOTHING * old + (1 - SMOOTHING) * value
        self._last |= {"lr": rate, "norm": norm}

    def figures(self) -> dict[str, float]:
        return {name: float(f"{v:.5g}") for name, v in (self.losses | self._last).items()}
