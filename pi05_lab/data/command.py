"""`pi05 record`: the scripted experts' demonstrations as a dataset or as bags."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pi05_lab.data import images as pictures
from pi05_lab.data.bags import BagWriter
from pi05_lab.data.lerobot_format import DatasetError
from pi05_lab.data.lerobot_writer import DatasetWriter
from pi05_lab.data.simulated import PICTURE_KEY, Frame, GripperUnits, RecordConfig, features
from pi05_lab.data.workers import MakeActor, episodes

BAG_START_S = 1.0
"""Of the simulated clock; ROS takes 0 for "no time yet"."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--episodes", type=int, default=50, help="how many (default: 50)")
    parser.add_argument(
        "--tasks",
        default="touch,pick,place,wave,home",
        help="what is done, VERB or VERB=WEIGHT, with commas between (default: all alike)",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same data (default: 0)")
    parser.add_argument("--fps", type=int, default=50, help="frames per second (default: 50)")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=(112, 84),
        metavar=("WIDTH", "HEIGHT"),
        help="of pictures, pixels (default: 112 84)",
    )
    parser.add_argument(
        "--format", choices=("lerobot", "mcap"), default="lerobot", help="default: lerobot"
    )
    parser.add_argument(
        "--video", action="store_true", help="H.264 video instead of PNG pictures in the data"
    )
    parser.add_argument(
        "--labels",
        choices=("executed", "chunk"),
        default="executed",
        help="chunk: label every frame with the expert's next 50 steps, too (default: executed)",
    )
    parser.add_argument(
        "--states",
        action="store_true",
        help="a few moments of many random situations, labelled with chunks, for training",
    )
    parser.add_argument(
        "--instructions",
        type=int,
        default=4,
        help="with --states: instructions that each picture is labelled for (default: 4)",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")


def run(options: argparse.Namespace, make_actor: MakeActor | None = None) -> int:
    """Record; 0 if the whole dataset is there, 1 if nothing is."""
    console = Console()
    try:
        recipe = _recipe(options)
        if options.format == "mcap":
            _record_bags(recipe, options, console)
        else:
            _record_dataset(recipe, options, console, make_actor)
    except (DatasetError, FileExistsError, ImportError, RuntimeError) as error:
        console.print(str(error), style="bold red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; nothing was recorded", style="bold red")
        return 1
    return 0


def _recipe(options: argparse.Namespace) -> RecordConfig:
    for name, least in (("episodes", 1), ("workers", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise DatasetError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if min(options.size) < 16:
        raise DatasetError(f"--size must be at least 16 16, got {' '.join(map(str, options.size))}")
    if options.format == "mcap" and (options.states or options.video):
        raise DatasetError("a bag holds whole episodes of pictures: no --states, no --video")
    if options.video and options.states:
        raise DatasetError("--states repeats pictures, which only PNG stores once: no --video")
    if options.output.exists():
        raise FileExistsError(f"{options.output} is there already; remove it or name another")
    verbs, weights = [], []
    for part in options.tasks.split(","):
        verb, _, weight = part.strip().partition("=")
        verbs.append(verb)
        try:
            weights.append(float(weight or 1.0))
        except ValueError:
            raise DatasetError(f"--tasks: {weight!r} is no weight of {verb!r}") from None
    return RecordConfig(
        verbs=tuple(verbs),
        weights=tuple(weights),
        seed=options.seed,
        fps=options.fps,
        size_px=tuple(options.size),
        chunks=options.labels == "chunk",
        visits=options.states,
        instructions=options.instructions,
        encode=options.format == "lerobot" and not options.video,
    )


def _record_dataset(
    recipe: RecordConfig,
    options: argparse.Namespace,
    console: Console,
    make_actor: MakeActor | None,
) -> None:
    started_s = time.monotonic()
    pictured = 0
    kind = features(recipe, use_video=options.video)
    with (
        DatasetWriter(options.output, recipe.fps, kind, robot_type="aloha_sim") as writer,
        _progress(console, options.episodes) as advance,
    ):
        for frames in episodes(recipe, options.episodes, options.workers, make_actor):
            for frame in frames:
                pictured += frame.images is not None
                extra = frame.extra
                if recipe.visits:
                    extra = {**extra, PICTURE_KEY: [pictured - 1]}
                writer.add_frame(frame.images, frame.state, frame.action, frame.task, extra)
            writer.end_episode()
            advance(f"{writer.frames} frames")
    _report(console, options.output, writer.frames, pictured, time.monotonic() - started_s)


def _record_bags(recipe: RecordConfig, options: argparse.Namespace, console: Console) -> None:
    from pi05_lab.sim.scene import ARM_JOINTS, JOINT_NAMES, SIDES

    units = GripperUnits()
    started_s = time.monotonic()
    controllers = {
        f"{side}_arm_controller": [f"{side}_{joint}" for joint in (*ARM_JOINTS, "gripper")]
        for side in SIDES
    }
    count = 0
    with (
        _folder(options.output) as folder,
        _progress(console, options.episodes) as advance,
    ):
        for number, frames in enumerate(episodes(recipe, options.episodes, options.workers)):
            path = folder / f"episode_{number:06d}"
            with BagWriter(path, JOINT_NAMES, controllers, 1.0 / recipe.fps) as bag:
                for k, frame in enumerate(frames):
                    _write_bag_frame(bag, frame, units, BAG_START_S + k / recipe.fps)
            count += len(frames)
            advance(f"{count} frames")
    _report(console, options.output, count, count, time.monotonic() - started_s)


def _write_bag_frame(bag: BagWriter, frame: Frame, units: GripperUnits, stamp_s: float) -> None:
    images = {
        camera: pictures.decode(picture) if isinstance(picture, bytes) else picture
        for camera, picture in (frame.images or {}).items()
    }
    bag.write(
        stamp_s,
        images,
        units.to_joints(frame.state),
        frame.velocities,
        units.to_joints(frame.action),
        frame.task,
    )


@contextmanager
def _folder(output: Path) -> Iterator[Path]:
    """A folder that gets its name when all went well, and is removed otherwise."""
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar over episodes; what it yields advances it by one."""
    columns = (
        TextColumn("recording"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, note="")
        yield lambda note: progress.update(task, advance=1, note=note)


def _report(console: Console, output: Path, frames: int, pictured: int, took_s: float) -> None:
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    console.print(
        f"{output}: {frames} frames, {pictured} pictures of each camera, {size / 1e6:.1f} MB, "
        f"{pictured / took_s:.0f} pictures/s",
        markup=False,
        highlight=False,
    )
