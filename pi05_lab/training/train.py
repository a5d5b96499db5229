"""The training loop: stages, states to resume from, validation, evaluation, the checkpoint."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from pi05_lab.data.hub import open_dataset
from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.training import state
from pi05_lab.training.checkpoints import save_checkpoint, write_yaml
from pi05_lab.training.config import LOSSES, ConfigError, StageConfig, TrainConfig
from pi05_lab.training.data import Batch, Examples, load_batches
from pi05_lab.training.lora import add_adapters
from pi05_lab.training.losses import TrainModule, checkpoint_layers, choose_parameters
from pi05_lab.training.metrics import LOG_FILE, MetricsLogger
from pi05_lab.training.optim import AveragedWeights, learning_rate, make_optimizers
from pi05_lab.training.plugins import load_plugin
from pi05_lab.training.processes import Processes, open_processes
from pi05_lab.training.processing import start
from pi05_lab.training.validation import validate

CHECKPOINT = "checkpoint"
"""The folder under `output` that `Policy.from_pretrained` loads."""
CHECKPOINTS = "checkpoints"
"""The folder under `output` of checkpoints on the way: by number of steps, and `best`."""
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
        stop: polled after every step; True in one process saves the state and ends all.

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
    if not resume and state.has_state(output):
        raise ConfigError(
            f"{output} has a training: continue it with --resume, or give another output"
        )
    processes = open_processes(config)
    try:
        trainer = Trainer(config, output, processes, evaluate, stop)
        if resume:
            trainer.restore()
        if processes.is_main:
            output.mkdir(parents=True, exist_ok=True)
            write_yaml(output, config)
            kept = trainer.position.total_steps
            logger = MetricsLogger(output, console, config.trackers, kept)
        else:
            logger = MetricsLogger(None)
        origin = trainer.processor.origin
        if console is not None and origin and processes.is_main:
            console.print(Markdown(origin))
        with logger:
            done = trainer.run(logger)
    finally:
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
        self.position = state.Position()
        self._processes = processes
        self._evaluate = evaluate
        self._stop = stop
        data = config.data
        opened = [open_dataset(d.root, int(data.disk_gb * 2**30)) for d in data.datasets]
        cache_bytes = int(data.cache_gb * 2**30)
        datasets = [LeRobotDataset(folder, cache_bytes, fetch) for folder, fetch in opened]
        plugin = load_plugin(config)
        network, self.processor = start(config, datasets, plugin)
        torch.manual_seed(config.seed)
        losses = {name for stage in config.stages for name, w in stage.losses.items() if w > 0}
        auxiliary = None
        others = losses - set(LOSSES)
        if plugin is not None and others:
            auxiliary = plugin.make_losses(config, self.processor, datasets, others)
        self.examples = Examples(datasets, config, self.processor, auxiliary)
        if config.lora is not None:
            add_adapters(network, config.lora)
        if config.gradient_checkpointing:
            checkpoint_layers(network)
        self.module = TrainModule(network, auxiliary).to(processes.device)
        processes.shard(self.module)
        self.average = AveragedWeights({}, 0.0)
        self._optimizers: list[torch.optim.Optimizer] = []
        self._restored: Path | None = None
        # Running means of the stage, and all figures of its latest step.
        self._losses: dict[str, float] = {}
        self._times: dict[str, float] = {}
        self._figures: dict[str, float] = {}

    def restore(self) -> None:
        """Continue from the state in `output`; raises as `state.read_position`."""
        self.position, self._restored = state.read_position(self.output, self.config)

    def run(self, logger: MetricsLogger) -> bool:
        """Run the remaining stages; False if it was stopped."""
        if self._restored is not None:
            tensors = {"module": get_model_state_dict(self.module)}
            state.read_tensors(self._restored, tensors, self._processes)
        for stage in self.config.stages[self.position.stage :]:
            if not self._run_stage(stage, logger):
                return False
        self._save_checkpoint(CHECKPOINT)
        self._run_evaluation(logger)
        # again, with the evaluation's figures in the model card
        self._save_checkpoint(CHECKPOINT)
        return True

    def _run_stage(self, stage: StageConfig, logger: MetricsLogger) -> bool:
        position, processes = self.position, self._processes
        parameters = choose_parameters(self.module, stage, self.config)
        if not parameters:
            raise ConfigError(
                f"stage {stage.name!r}: no parameter learns: check train, freeze_vision_encoder "
                "and train_expert_only"
            )
        self.average = AveragedWeights(parameters, stage.ema, self.config.ema_device)
        self._optimizers = make_optimizers(parameters, stage, self.config.optimizer_precision)
        if self._restored is not None and position.step:
            self._read_stage(self._restored)
        self._restored = None
        self._losses, self._times = {}, {}
        wrapped = processes.wrap(self.module)
        # batches are a function of seed, stage and step
        seed = (self.config.seed, position.stage)
        loader = load_batches(
            self.examples,
            stage,
            seed,
            position.step,
            self.config.data.workers,
            processes.rank,
            processes.count,
        )
        with loader as batches:
            while self._part(stage) < 1.0:
                self._step(stage, wrapped, batches)
                # one process's signal ends all of them after the same step
                stopped = processes.any(self._stop())
                self._after_step(stage, logger, stopped)
                if stopped:
                    return False
        del wrapped
        self._end_stage(stage, logger)
        return True

    def _part(self, stage: StageConfig) -> float:
        """Completed part of the stage, 0 to 1."""
        if stage.steps is not None:
            return self.position.step / stage.steps if stage.steps else 1.0
        assert stage.minutes is not None
        return min(1.0, self.position.stage_s / (60 * stage.minutes))

    def _step(self, stage: StageConfig, wrapped: nn.Module, batches: Iterator[Batch]) -> None:
        position, passes = self.position, stage.accumulate
        begin = time.perf_counter()
        waited, rows = 0.0, 0
        sums: dict[str, Tensor] = {}
        for index in range(passes):
            waiting = time.perf_counter()
            batch = next(batches).to(self._processes.device)
            waited += time.perf_counter() - waiting
            rows += len(batch.tokens)
            with self._processes.accumulating(wrapped, last=index == passes - 1):
                with self._autocast():
                    loss, losses = wrapped(batch, stage.losses, stage.insulate)
                (loss / passes).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value / passes
        rate = learning_rate(stage, position.step, self._part(stage))
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), stage.clip)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
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
        self.average.update(position.step)
        took = time.perf_counter() - begin
        position.step += 1
        position.total_steps += 1
        position.stage_s += took
        position.total_s += took
        count = self._processes.count
        means = {name: x / count for name, x in self._processes.sum(sums).items()}
        _smooth(self._losses, means)
        pairs_per_s = count * rows / took
        _smooth(self._times, {"step_s": took, "wait_s": waited, "pairs_per_s": pairs_per_s})
        self._figures = self._losses | self._times | {"lr": rate, "norm": float(norm)}

    def _after_step(self, stage: StageConfig, logger: MetricsLogger, stopped: bool) -> None:
        """The same in all processes: validation, saving and evaluation are collective."""
        config, position = self.config, self.position
        logger.show_progress(stage.name, self._part(stage))
        if position.total_steps % config.log_steps == 0:
            figures = {"stage": stage.name, "minutes": round(position.total_s / 60, 3)}
            figures |= {name: float(f"{value:.5g}") for name, value in self._figures.items()}
            logger.write("train", position.total_steps, figures)
        if position.total_steps % config.validation.every_steps == 0:
            self._validate(stage, logger)
        if config.save.every_steps and position.total_steps % config.save.every_steps == 0:
            self._keep_checkpoint()
        every_s = 60 * config.evaluation.every_minutes
        due = every_s and position.total_s - position.evaluated_s >= every_s
        if every_s and self._processes.any(bool(due)):
            # saved first: the evaluation may fail
            self._save_state()
            self._save_checkpoint(CHECKPOINT)
            self._run_evaluation(logger)
        if stopped or position.total_steps % config.checkpoint_steps == 0:
            self._save_state()

    def _end_stage(self, stage: StageConfig, logger: MetricsLogger) -> None:
        position = self.position
        self.average.exchange()
        self.average = AveragedWeights({}, 0.0)
        figures: dict[str, float] = {"steps": position.step, "minutes": position.stage_s / 60}
        figures |= dict(sorted(self._losses.items()))
        checked = self._validate(stage, logger)
        figures |= {f"held-out {name}": value for name, value in checked.items()}
        logger.write("stage", position.total_steps, {"stage": stage.name, **figures})
        position.summary[stage.name] = figures
        position.stage, position.step, position.stage_s = position.stage + 1, 0, 0.0
        self._optimizers = []
        self._save_state()

    def _validate(self, stage: StageConfig, logger: MetricsLogger) -> dict[str, float]:
        with self.average.applied(), self._autocast():
            figures = validate(
                self.module, self.examples, stage.losses, self.config, self._processes
            )
        if figures:
            logger.write("validation", self.position.total_steps, figures)
        self._keep_best(figures)
        return figures

    def _keep_best(self, figures: Mapping[str, float]) -> None:
        key = self.config.save.best
        if not key or not figures:
            return
        if key not in figures:
            raise ConfigError(
                f"save.best: the validation has no {key!r}; it has {', '.join(figures)}"
            )
        best = self.position.best
        if best is None or figures[key] < best:
            self.position.best = figures[key]
            self._save_checkpoint(f"{CHECKPOINTS}/best")

    def _keep_checkpoint(self) -> None:
        """Save a checkpoint beside the others, and remove the oldest beyond `save.keep`."""
        self._save_checkpoint(f"{CHECKPOINTS}/{self.position.total_steps:06d}")
        if self._processes.is_main:
            numbered = sorted((self.output / CHECKPOINTS).glob("[0-9]*[0-9]"))
            for folder in numbered[: -self.config.save.keep]:
                shutil.rmtree(folder)

    def _run_evaluation(self, logger: MetricsLogger) -> None:
        self.position.evaluated_s = self.position.total_s
        if self._evaluate is not None and self._processes.is_main:
            # loading a policy may set the number of threads of the whole process
            threads = torch.get_num_threads()
            try:
                figures = dict(self._evaluate(self.output / CHECKPOINT))
            finally:
                torch.set_num_threads(threads)
            logger.write("evaluation", self.position.total_steps, figures)
        self._processes.wait()

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self._processes.device.type, torch.bfloat16, enabled=enabled)

    def _save_state(self) -> None:
        tensors = {"module": get_model_state_dict(self.module)}
        if self.position.step:
            tensors |= self._stage_tensors()
        state.save_state(self.output, self.config, self.position, tensors, self._processes)

    def _stage_tensors(self) -> dict[str, Any]:
        return {
            "average": self.average.shadow,
            "optimizers": get_optimizer_state_dict(self.module, self._optimizers),
        }

    def _read_stage(self, folder: Path) -> None:
        """Load the averages, in place, and the optimisers' states of a stage that has begun."""
        tensors = self._stage_tensors()
        state.read_tensors(folder, tensors, self._processes)
        set_optimizer_state_dict(
            self.module, self._optimizers, optim_state_dict=tensors["optimizers"]
        )

    def _save_checkpoint(self, name: str) -> None:
        """Write a checkpoint with the averaged weights into a folder of the output."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=self._processes.sharded)
        with self.average.applied():
            weights: dict[str, Any] = get_model_state_dict(self.module, options=options)
            if self._processes.is_main:
                begin = "network."
                save_checkpoint(
                    self.output / name,
                    {k.removeprefix(begin): v for k, v in weights.items() if k.startswith(begin)},
                    self.processor,
                    self.config,
                    self.position,
                    self.examples.counts(),
                    self.output / LOG_FILE,
                )
        self._processes.wait()


def _smooth(means: dict[str, float], values: Mapping[str, float]) -> None:
    """Update running means in place; they begin at the first values."""
    for name, value in values.items():
        means[name] = SMOOTHING * means.get(name, value) + (1 - SMOOTHING) * value
