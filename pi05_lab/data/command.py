"""`pi05 convert`, `pi05 record` and `pi05 dagger`: data from bags, experts and policies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pi05_lab.console import make_console, progress_bar, say
from pi05_lab.data import simulated
from pi05_lab.data.bags import BagError, Notes
from pi05_lab.data.lerobot_dataset import LeRobotDataset
from pi05_lab.data.lerobot_format import PICTURE_KEY, DatasetError
from pi05_lab.data.lerobot_writer import DatasetWriter
from pi05_lab.data.robot_bag import RobotBagWriter
from pi05_lab.data.simulated import MakePolicy, RecordConfig
from pi05_lab.files import atomic_folder
from pi05_lab.sim.experts import grippers_to_metres
from pi05_lab.sim.scene import ARM_JOINTS, JOINT_NAMES, SIDES
from pi05_ros.cli import CommandError, one_of
from pi05_ros.robot_config import RobotConfigError

Option = typer.Option
BAG_START_S = 1.0
"""Of the simulated clock; ROS takes 0 for "no time yet"."""

ALL_TASKS = "touch,pick,place,wave,home"
Tasks = Annotated[str, Option(help="Tasks, VERB or VERB=WEIGHT, separated by commas.")]
Size = Annotated[tuple[int, int], Option(metavar="WIDTH HEIGHT", help="Of the images, pixels.")]
Output = Annotated[Path, Option(help="Folder to make.")]
Seed = Annotated[int, Option(min=0, help="The same seed gives the same data.")]
Episodes = Annotated[int, Option(min=1, help="Number of episodes.")]
Workers = Annotated[int, Option(min=1, help="Processes.")]


def record(
    output: Output,
    episodes: Episodes = 50,
    tasks: Tasks = ALL_TASKS,
    seed: Seed = 0,
    fps: Annotated[int, Option(help="Frames per second, a divisor of 50.")] = 50,
    size: Size = (112, 84),
    format: Annotated[str, Option(
        **one_of(("lerobot", "mcap")), help="LeRobot data set or bags.")] = "lerobot",
    video: Annotated[bool, Option(
        "--video", help="H.264 video instead of PNG images in the data.")] = False,
    labels: Annotated[str, Option(
        **one_of(("executed", "chunk")),
        help="chunk: also label every frame with the expert's next 50 steps.")] = "executed",
    states: Annotated[bool, Option(
        "--states", help="Random situations with chunks, for pi05 train alone.")] = False,
    instructions: Annotated[int, Option(
        help="With --states: instructions that each image is labelled for.")] = 4,
    workers: Workers = 2,
) -> int:  # fmt: skip
    """Record demonstrations; the exit code."""
    if format == "mcap" and (states or video):
        raise CommandError("a bag holds whole episodes of images: no --states, no --video")
    if states and video:
        raise CommandError("--states repeats images, which only PNG stores once: no --video")
    options = {"seed": seed, "fps": fps, "size_px": size, "chunks": labels == "chunk"}
    options |= {"states": states, "instructions": instructions}
    with one_line_errors():
        config = make_config(tasks, **options, encode=format == "lerobot" and not video)
        if format == "mcap":
            record_bags(config, output, episodes, workers)
        else:
            record_dataset(config, output, episodes, workers, video)
    return 0


def dagger(
    checkpoint: Annotated[str, typer.Argument(help="Folder, or 'small' (the shipped policy).")],
    output: Output,
    episodes: Episodes = 300,
    tasks: Tasks = ALL_TASKS,
    seed: Seed = 0,
    size: Size = (112, 84),
    instructions: Annotated[int, Option(
        help="Instructions that each image is labelled for.")] = 4,
    workers: Workers = 2,
) -> int:  # fmt: skip
    """Record the states that a policy visits, labelled by the scripted expert; the exit code.

    Demonstrations show what to do where an expert goes; a policy's errors lead elsewhere (DAgger,
    Ross et al. 2011). The data have the format of `pi05 record --states` and are trained on beside
    it. They depend on the checkpoint, the options and the seed, not on the number of workers.
    """
    from pi05_ros.adapters.factory import open_policy  # loads torch, which `record` does not need
    from pi05_ros.policy import CheckpointError

    try:
        open_policy(checkpoint)
    except CheckpointError as error:
        raise CommandError(str(error)) from None
    with one_line_errors():
        config = make_config(tasks, seed=seed, size_px=size, states=True, instructions=instructions)
        make_policy: Any = partial(open_policy, checkpoint, seed=seed, threads=1)
        record_dataset(config, output, episodes, workers, make_policy=make_policy)
    return 0


def convert(
    paths: Annotated[list[Path], typer.Argument(
        metavar="BAG... DATASET", help="Bags, and the folder to make.")],
    params_file: Annotated[Path | None, Option(
        help="Of the policy node: topics, cameras, joints. Default: config/aloha.yaml.")] = None,
    namespace: Annotated[str, Option(help="Of the recorded topics.")] = "",
    node: Annotated[str, Option(help="Name of the recorded policy node.")] = "policy",
    fps: Annotated[int | None, Option(
        min=1, help="Frames per second. Default: the robot's rate.")] = None,
    action: Annotated[str, Option(
        **one_of(("commanded", "measured")),
        help="The action is the controllers' command, or the next measured position.",
    )] = "commanded",
    episodes: Annotated[str, Option(
        **one_of(("instruction", "bag")), help="What an episode is.")] = "instruction",
    instruction: Annotated[str | None, Option(help="Instead of the recorded ones.")] = None,
    trim: Annotated[bool, Option(
        "--trim", help="Leave out the idle beginning and end of each episode.")] = False,
    video: Annotated[bool, Option(
        "--video/--no-video", help="H.264 video, or PNG images in the data.")] = True,
    size: Annotated[tuple[int, int] | None, Option(
        metavar="WIDTH HEIGHT", help="Scale images to this size.")] = None,
) -> int:  # fmt: skip
    """Convert bags into a LeRobot data set; 1 if a bag was left out.

    A second call with the same arguments continues a conversion that was stopped.
    """
    from pi05_lab.data.convert import ConvertConfig, convert_bags
    from pi05_lab.data.topics import read_evaluated_robot

    *bags, output = paths
    if not bags:
        raise CommandError("give at least one bag, and the folder to make")
    console = make_console()
    try:
        robot = read_evaluated_robot(params_file, namespace, node)
        rate = fps or policy_rate(robot.robot)
        config = ConvertConfig(
            rate, action == "measured", episodes == "bag", trim, instruction, size
        )

        def report(bag: Path, result: str, notes: Notes) -> None:
            say(console, f"{bag}: {result}")
            for note in notes:
                say(
                    console, f"  {note.text}" + (f" ({note.count} times)" if note.count > 1 else "")
                )

        left_out = convert_bags(bags, output, robot, config, video, report)
    except (BagError, DatasetError, RobotConfigError, FileExistsError, OSError) as error:
        raise CommandError(str(error)) from None
    except KeyboardInterrupt:
        raise CommandError(
            "interrupted: repeat the command to convert the remaining bags"
        ) from None
    data = LeRobotDataset(output)
    say(
        console,
        f"{output}: {len(data.episodes)} episodes, {len(data)} frames, {rate} per second, "
        f"{len(data.meta.tasks)} instructions"
        + (f"; {left_out} bags left out" if left_out else ""),
    )
    return 1 if left_out else 0


def policy_rate(robot: str) -> int:
    """Frames per second of a robot's chunks; DatasetError if a data set cannot have them."""
    from pi05_ros.policy.robots import GENERIC, DescriptionError, read_robot

    if robot == GENERIC:
        raise DatasetError("robot 'generic' has the checkpoint's rate: give --fps")
    try:
        rate = 1.0 / read_robot(robot).dt_s
    except DescriptionError as error:
        raise DatasetError(str(error)) from None
    if abs(rate - round(rate)) > 1e-3 * rate:
        raise DatasetError(
            f"robot {robot!r} has {rate:.3f} steps per second, and a LeRobot data set a whole "
            "number of frames: give --fps, and dt_s to match in the robot's description"
        )
    return round(rate)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what ends a recording into a `CommandError`."""
    try:
        yield
    except (BagError, DatasetError, FileExistsError, RuntimeError) as error:
        raise CommandError(str(error)) from None
    except KeyboardInterrupt:
        raise CommandError("interrupted; nothing was recorded") from None


def make_config(tasks: str, **options: Any) -> RecordConfig:
    """The configuration for `--tasks` and the other options; DatasetError if out of range."""
    if min(options["size_px"]) < 16:
        size = " ".join(map(str, options["size_px"]))
        raise DatasetError(f"--size must be at least 16 16, got {size}")
    verbs, weights = [], []
    for part in tasks.split(","):
        verb, _, weight = part.strip().partition("=")
        verbs.append(verb)
        try:
            weights.append(float(weight or 1.0))
        except ValueError:
            raise DatasetError(f"--tasks: {weight!r} is not a weight of {verb!r}") from None
    return RecordConfig(tuple(verbs), tuple(weights), **options)


def record_dataset(
    config: RecordConfig,
    output: Path,
    count: int,
    workers: int,
    video: bool = False,
    make_policy: MakePolicy | None = None,
) -> None:
    """Record `count` episodes as a LeRobot data set in `output`, which must not exist."""
    console = make_console()
    started_s = time.monotonic()
    features = simulated.features(config, video)
    pictured = 0
    with (
        DatasetWriter(output, config.fps, features, robot_type="aloha_sim") as writer,
        progress_bar(console, "recording", count) as advance,
    ):
        for frames in simulated.episodes(config, count, workers, make_policy):
            for frame in frames:
                pictured += frame.images is not None
                extra = frame.extra | ({PICTURE_KEY: [pictured - 1]} if config.states else {})
                writer.add_frame(frame.images, frame.state, frame.action, frame.task, extra)
            writer.end_episode()
            advance(f"recording, {writer.frames} frames")
    say(console, _summary(output, writer.frames, pictured, time.monotonic() - started_s))


def record_bags(config: RecordConfig, output: Path, count: int, workers: int) -> None:
    """Record `count` episodes as a folder of bags; errors as of `record_dataset`."""
    console = make_console()
    started_s = time.monotonic()
    controllers = {
        f"{side}_arm_controller": [f"{side}_{joint}" for joint in (*ARM_JOINTS, "gripper")]
        for side in SIDES
    }
    written = 0
    with atomic_folder(output) as folder, progress_bar(console, "recording", count) as advance:
        for number, frames in enumerate(simulated.episodes(config, count, workers)):
            path = folder / f"episode_{number:06d}"
            with RobotBagWriter(path, JOINT_NAMES, controllers, 1.0 / config.fps) as bag:
                for k, frame in enumerate(frames):
                    images: Any = frame.images  # arrays, because config.encode is off
                    state, action = map(grippers_to_metres, (frame.state, frame.action))
                    stamp_s = BAG_START_S + k / config.fps
                    bag.write(stamp_s, images, state, frame.velocities, action, frame.task)
            written += len(frames)
            advance(f"recording, {written} frames")
    say(console, _summary(output, written, written, time.monotonic() - started_s))


def _summary(output: Path, frames: int, images: int, took_s: float) -> str:
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return (
        f"{output}: {frames} frames, {images} images of each camera, {size / 1e6:.1f} MB, "
        f"{images / took_s:.0f} images/s"
    )
