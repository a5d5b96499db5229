"""`pi05`: the command line. The chosen command's module is imported, and no other."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import typer
from rich.console import Console

from pi05_ros import __version__

ENTRY_POINTS = "pi05_ros.commands"
"""Group of the entry points by which other packages add commands: each is a list of `Command`s."""


class Command(NamedTuple):
    """One command, described without importing it."""

    name: str
    """`train`, or with its group `bench latency`."""
    summary: str
    """One line of `pi05 --help`."""
    panel: str
    """Heading of the command in `pi05 --help`."""
    target: str
    """`module:function`. The function's parameters are typer's; it returns the exit code."""
    extra: str = ""
    """The extras of pi05_ros that bring what the command needs: `sim,eval`."""
    group_summary: str = ""
    """The line of the group in `pi05 --help`, for a command in a group."""


COMMANDS = (
    Command("check", "Check a checkpoint, and whether it runs with a robot", "Robot",
            "pi05_ros.check:check_command"),
    Command("serve", "Serve a policy to many robots over openpi's websocket", "Robot",
            "pi05_ros.server.command:serve"),
)  # fmt: skip


class CommandError(Exception):
    """Ends a command with one line: what happened, where, what to do."""


class ValueIfBare(NamedTuple):
    """In an option's `Annotated`: the value of a bare option, as `--ray` for `--ray auto`."""

    value: str


def one_of(choices: Sequence[str]) -> dict[str, Any]:
    """Arguments of `typer.Option` for an option or a list option that takes only these values."""

    def check(given: Any) -> Any:
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value not in choices:
                raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}")
        return given

    return {"callback": check, "metavar": f"[{'|'.join(choices)}]"}


def all_commands() -> dict[str, Command]:
    """Name → command: the runtime's own, then those of the installed packages."""
    found = list(COMMANDS)
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        found.extend(entry.load())
    return {command.name: command for command in found}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; the process's exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    commands = all_commands()
    chosen = _chosen(arguments, commands)
    app = _make_typer("pi05", "π0.5 on a ROS 2 robot.")
    app.callback()(_options)
    groups: dict[str, typer.Typer] = {}
    for command in commands.values():
        function = _load(command) if command is chosen else _unloaded
        if command is chosen:
            count = len(command.name.split())
            arguments[count:] = _repeat_options(arguments[count:], function)
        *parent, name = command.name.split()
        if parent and parent[0] not in groups:
            group = groups[parent[0]] = _make_typer(parent[0], command.group_summary)
            app.add_typer(group, name=parent[0], rich_help_panel=command.panel)
        (groups[parent[0]] if parent else app).command(
            name, help=command.summary, rich_help_panel=None if parent else command.panel
        )(function)
    try:
        app(arguments, prog_name="pi05")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0


def _make_typer(name: str, summary: str) -> typer.Typer:
    return typer.Typer(
        name=name,
        help=summary,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    )


def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda on: _show_version(on),
                           help="Show the version and exit.")
    ] = False,
) -> None:  # fmt: skip
    pass


def _show_version(requested: bool) -> None:
    if requested:
        print(f"pi05_ros {__version__}")
        raise typer.Exit()


def _unloaded() -> None:
    """Stands for the commands that are not chosen."""


def _chosen(arguments: Sequence[str], commands: Mapping[str, Command]) -> Command | None:
    """The command that is called; for shell completion it is in the words typed so far."""
    completing = "_PI05_COMPLETE" in os.environ
    words = os.environ.get("COMP_WORDS", "").split()[1:] if completing else arguments
    return commands.get(" ".join(words[:1])) or commands.get(" ".join(words[:2]))


def _load(command: Command) -> Callable[..., None]:
    """The command's function, which ends with an exit code and one line for an error.

    Raises:
        SystemExit: the command needs a package that is not installed.
    """
    module_name, _, name = command.target.partition(":")
    try:
        function: Callable[..., int] = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise SystemExit(_missing(command, error)) from None

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> None:
        try:
            code = function(*args, **options)
        except CommandError as error:
            Console(stderr=True).print(
                str(error), style="bold red", markup=False, highlight=False, soft_wrap=True
            )
            code = 1
        except ImportError as error:
            print(_missing(command, error), file=sys.stderr)
            code = 1
        raise typer.Exit(code)

    return run


def _missing(command: Command, error: ImportError) -> str:
    if error.name is None:  # raised by a module that names the remedy
        return str(error)
    ours = str(error.name).split(".")[0] in ("pi05_ros", "pi05_lab")
    if ours or not command.extra or not isinstance(error, ModuleNotFoundError):
        raise error
    return f"pi05 {command.name} needs {error.name}: pip install 'pi05_ros[{command.extra}]'"


def _repeat_options(arguments: Sequence[str], function: Callable[..., Any]) -> list[str]:
    """Write options as click reads them.

    Options of list type take several values: `--tasks touch pick` → `--tasks touch --tasks pick`.
    Options with `ValueIfBare` get their value: `--ray` → `--ray auto`.
    """
    several = set(_options_with(function, _is_list))
    bare = dict(_options_with(function, _value_if_bare))
    repeated: list[str] = []
    option = ""
    for index, argument in enumerate(arguments):
        if argument == "--":
            return [*repeated, *arguments[index:]]
        follows = arguments[index + 1 : index + 2]
        if argument.startswith("-"):
            option = argument if (argument, True) in several else ""
            if not option or not follows or follows[0].startswith("--"):
                repeated.append(argument)
            if argument in bare and (not follows or follows[0].startswith("-")):
                repeated.append(bare[argument])
        elif option:
            repeated += [option, argument]
        else:
            repeated.append(argument)
    return repeated


def _options_with(
    function: Callable[..., Any], select: Callable[[Any, Sequence[Any]], Any]
) -> Iterator[tuple[str, Any]]:
    """Names of the options for which `select(type, annotations)` is true, with its value."""
    hints = get_type_hints(function, include_extras=True)
    for name in inspect.signature(function).parameters:
        if get_origin(hints[name]) is not Annotated:
            continue
        kind, *extra = get_args(hints[name])
        selected = select(kind, extra)
        for info in extra:
            if selected and isinstance(info, typer.models.OptionInfo):
                declared = [text for text in info.param_decls or () if text.startswith("-")]
                for option in declared or [f"--{name.replace('_', '-')}"]:
                    yield option, selected


def _is_list(kind: Any, extra: Sequence[Any]) -> bool:
    return any(get_origin(each) is list for each in (kind, *get_args(kind)))


def _value_if_bare(kind: Any, extra: Sequence[Any]) -> str | None:
    return next((each.value for each in extra if isinstance(each, ValueIfBare)), None)


if __name__ == "__main__":
    # Commands raise `pi05_ros.cli.CommandError`, a different class than `__main__.CommandError`.
    from pi05_ros.cli import main as imported_main

    raise SystemExit(imported_main())
