"""`pi05 train`: trains or fine-tunes on LeRobot data sets."""

from __future__ import annotations

import os
import pkgutil
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pi05_lab.console import make_console, say
from pi05_lab.training.config import ConfigError, DatasetConfig, read_config
from pi05_ros.cli import CommandError

Option = typer.Option


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the training.")],
    output: Annotated[str | None, Option(
        help="Folder for state, log and checkpoint, instead of the file's.")] = None,
    data: Annotated[list[str] | None, Option(
        help="Dataset folders instead of the file's.")] = None,
    set_: Annotated[list[str] | None, Option(
        "--set", metavar="KEY=VALUE", help="Replace a value: stages.0.lr=1e-4.")] = None,
    resume: Annotated[bool, Option(
        "--resume", help="Resume from the state in the output folder.")] = False,
    push_to_hub: Annotated[str | None, Option(
        metavar="OWNER/NAME", help="Upload the checkpoint to this Hugging Face model.")] = None,
    quiet: Annotated[bool, Option("--quiet", help="No table.")] = False,
) -> int:  # fmt: skip
    """Train; 0 when complete, 130 when stopped with a state to resume from."""
    # Spinning OpenMP threads stall each other when there are more of them than cores. PyTorch
    # reads the variable when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from pi05_lab.data.lerobot_format import DatasetError
    from pi05_lab.training import train as trainer
    from pi05_ros.policy.weights import CheckpointError

    console = make_console(stderr=True)
    try:
        if push_to_hub:
            check_upload(push_to_hub)
        settings = read_config(config, set_ or ())
        settings = replace(settings, output=output or settings.output)
        if data:
            chosen = tuple(map(DatasetConfig, data))
            settings = replace(settings, data=replace(settings.data, datasets=chosen))
        evaluate = _import_function(settings.evaluation.function)
        with _stop_on_signal() as stop:
            checkpoint = trainer.train(settings, evaluate, None if quiet else console, resume, stop)
    except (ConfigError, DatasetError, CheckpointError, OSError) as error:
        raise CommandError(str(error)) from None
    if checkpoint is None:
        options = ["--output", output] if output else []
        options += [part for root in data or () for part in ("--data", root)]
        options += [part for change in set_ or () for part in ("--set", change)]
        options += ["--push-to-hub", push_to_hub] if push_to_hub else []
        again = shlex.join(["pi05", "train", str(config), *options, "--resume"])
        say(console, f"Stopped. Resume with: {again}")
        return 130
    say(console, f"{checkpoint}: done")
    if push_to_hub and os.environ.get("RANK", "0") == "0":
        try:
            say(console, f"{upload(checkpoint, push_to_hub)}: uploaded")
        except ConfigError as error:
            raise CommandError(str(error)) from None
    return 0


def check_upload(repo: str) -> None:
    """Raise ConfigError before a training whose result could not be uploaded."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repo!r} is not OWNER/NAME: {error}") from None
    if get_token() is None:
        raise ConfigError("--push-to-hub: log in first: hf auth login")
    try:
        HfApi().whoami()
    except Exception as error:  # the hub's own, or those of its HTTP client
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"--push-to-hub: the login does not work: {reason}") from None


def upload(checkpoint: Path, repo: str) -> str:
    """Upload a checkpoint's folder to a private model, which is made if need be; its address.

    Raises:
        ConfigError: it cannot be uploaded; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=checkpoint, commit_message="Trained policy")
    except Exception as error:  # the hub's own, or those of its HTTP client
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{checkpoint} is complete and was not uploaded ({reason}); upload it with: "
            f"hf upload {repo} {checkpoint}"
        ) from None
    return str(url)


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """The first SIGINT or SIGTERM ends the training after the current step, a second at once."""
    requested = threading.Event()

    def request(number: int, frame: Any) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested.is_set
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _import_function(path: str) -> Callable[[Path], Mapping[str, float]] | None:
    if not path:
        return None
    try:
        function: Any = pkgutil.resolve_name(path)
        if not callable(function):
            raise ValueError(f"{path} is not a function")
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f'evaluation.function {path!r} must be "module:function" of an installed module: '
            f"{error}"
        ) from None
    return function  # type: ignore[no-any-return]
