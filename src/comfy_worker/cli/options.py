"""The command line of `comfy-worker`: its commands, and an option for each setting.

An option sets the environment variable of its setting, so that child processes read it too.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence

from comfy_worker.settings import Settings, list_settings

PROGRAM = "comfy-worker"
COMMANDS = {
    "run": "run one job on ComfyUI and write its outputs into a folder",
    "serve": "serve the HTTP APIs: the gateway",
    "worker": "run jobs of gateways with ENGINE=celery on the ComfyUI of this machine",
    "emulator": "serve ComfyUI's API without ComfyUI, models and a GPU, to try things out",
}
_WIDTH = 100
_USAGE_ERROR = 2


def parse_command(arguments: Sequence[str] | None) -> tuple[str, list[str]]:
    """Return the command and its arguments; print the help and exit if there is no command, or for `--help`."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND [OPTION VALUE]…",
        description="Turn a ComfyUI workflow into an API.\n\ncommands:\n"
        + "\n".join(f"  {name:{width}}  {description}" for name, description in COMMANDS.items()),
        epilog=f"`{PROGRAM} COMMAND --help` lists the options of a command and their environment variables.",
        formatter_class=_formatter,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        parser.print_help(sys.stderr)
        sys.exit(_USAGE_ERROR)
    chosen = parser.parse_args(given)
    return chosen.command, chosen.arguments


def parser_of(command: str, usage: str = "") -> argparse.ArgumentParser:
    """Return a parser without options for a command; `usage` is the part of the usage line after the options."""
    sentence = COMMANDS[command]
    return argparse.ArgumentParser(
        prog=f"{PROGRAM} {command}",
        usage=f"{PROGRAM} {command} [OPTION VALUE]… {usage}".rstrip(),
        description=sentence[0].upper() + sentence[1:] + ".",
        formatter_class=_formatter,
        allow_abbrev=False,
    )


def add_settings(parser: argparse.ArgumentParser, title: str, kind: type[Settings]) -> None:
    """Add an option for each setting that `kind` adds to the worker's; list secrets as variables only."""
    group = parser.add_argument_group(title, "Each option overrides the environment variable of the same name.")
    secrets = []
    for setting in list_settings(kind):
        name, *others = setting.variables
        also = f"; also read from {', '.join(others)}" if others else ""
        text = f"{setting.description} (default: {setting.default or 'not set'}{also})"
        if setting.is_secret:
            secrets.append(textwrap.fill(text, _WIDTH, initial_indent=f"  {name}: ", subsequent_indent="    "))
        else:
            option = "--" + name.lower().replace("_", "-")
            group.add_argument(option, metavar=name, dest=name, help=text.replace("%", "%%"))
    heading = f"{title}, as environment variables only, because other users can read a command line:"
    paragraph = "\n".join([heading, *secrets])
    parser.epilog = f"{parser.epilog}\n\n{paragraph}" if parser.epilog else paragraph


def put_into_environment(options: argparse.Namespace) -> None:
    """Set the variables of the settings that were given as options."""
    os.environ.update({name: value for name, value in vars(options).items() if name.isupper() and value is not None})


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, width=_WIDTH, max_help_position=44)
