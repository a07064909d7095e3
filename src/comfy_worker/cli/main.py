"""The command `comfy-worker`, which is also `python -m comfy_worker`: its commands, and an option for each setting.

An option sets the environment variable of its setting, so that child processes read it too.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from comfy_worker.startup import exit_code_of, run_until_signal

if TYPE_CHECKING:
    from comfy_worker.settings import Settings

PROGRAM = "comfy-worker"
COMMANDS = {
    "run": "run one job on ComfyUI and write its outputs into a folder",
    "serve": "serve the HTTP APIs: the gateway",
    "worker": "run jobs of gateways with ENGINE=celery on the ComfyUI of this machine",
    "emulator": "serve ComfyUI's API without ComfyUI, models and a GPU, to try things out",
}
_WIDTH = 100
_USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command until it is done or until a signal, and return the exit code of the process."""
    return exit_code_of(lambda: _main(list(sys.argv[1:] if arguments is None else arguments)))


def _main(arguments: Sequence[str]) -> int:
    command, rest = _parse_command(arguments)
    if command == "emulator":
        from comfy_emulator import __main__ as emulator

        emulator.main(rest, program=f"{PROGRAM} emulator")
        return 0
    return _run_job(rest) if command == "run" else run_until_signal(lambda: _serve_or_work(command, rest))


def _run_job(arguments: Sequence[str]) -> int:
    from comfy_worker.cli import handler, run
    from comfy_worker.settings import Settings

    parser = parser_of("run", "[FILE]")
    run.add_test_input(parser)
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        default=run.DEFAULT_FILE,
        help=f"JSON file with such a job (default: {run.DEFAULT_FILE})",
    )
    add_settings(parser, "settings of the worker", Settings)
    options = parser.parse_args(arguments)
    put_into_environment(options)
    return run.main(options.test_input, options.file, handler.prepare())


def _serve_or_work(command: str, arguments: Sequence[str]) -> int:
    from comfy_worker.env_file import read_env_file
    from comfy_worker.gateway.serve import serve, work
    from comfy_worker.gateway.settings import GatewaySettings
    from comfy_worker.settings import Settings

    parser = parser_of(command)
    add_settings(parser, "settings of the gateway", GatewaySettings)
    add_settings(parser, "settings of the worker", Settings)
    put_into_environment(parser.parse_args(arguments))
    read_env_file()
    return serve() if command == "serve" else work()


def _parse_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command and its arguments; print the help and exit if there is no command, or for `--help`."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND [OPTION VALUE]…",
        description="Turn a ComfyUI workflow into an API.\n\ncommands:\n"
        + "\n".join(f"  {name:8}  {description}" for name, description in COMMANDS.items()),
        epilog=f"`{PROGRAM} COMMAND --help` lists the options of a command and their environment variables.",
        formatter_class=_formatter,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not arguments:
        parser.print_help(sys.stderr)
        sys.exit(_USAGE_ERROR)
    options = parser.parse_args(arguments)
    return options.command, options.arguments


def parser_of(command: str, usage: str = "") -> argparse.ArgumentParser:
    """Return a parser without options for a command; `usage` is the part of the usage line after the options."""
    sentence = COMMANDS[command]
    return argparse.ArgumentParser(
        prog=f"{PROGRAM} {command}",
        usage=f"{PROGRAM} {command} [OPTION VALUE]… {usage}".rstrip(),
        description=sentence[0].upper() + sentence[1:] + ".",
        epilog="Secrets are read from environment variables only, because other users can read a command line:",
        formatter_class=_formatter,
        allow_abbrev=False,
    )


def add_settings(parser: argparse.ArgumentParser, title: str, kind: type[Settings]) -> None:
    """Add an option for each setting that `kind` adds to the worker's; list secrets as variables only."""
    from comfy_worker.settings import list_settings

    group = parser.add_argument_group(title, "Each option overrides the environment variable of the same name.")
    for setting in list_settings(kind):
        name, *others = setting.variables
        also = f"; also read from {', '.join(others)}" if others else ""
        text = f"{setting.description} (default: {setting.default or 'not set'}{also})"
        if setting.is_secret:
            secret = textwrap.fill(text, _WIDTH, initial_indent=f"  {name}: ", subsequent_indent="    ")
            parser.epilog = f"{parser.epilog}\n{secret}"
        else:
            option = "--" + name.lower().replace("_", "-")
            group.add_argument(option, metavar=name, dest=name, help=text.replace("%", "%%"))


def put_into_environment(options: argparse.Namespace) -> None:
    """Set the variables of the settings that were given as options."""
    os.environ.update({name: value for name, value in vars(options).items() if name.isupper() and value is not None})


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, width=_WIDTH, max_help_position=44)
