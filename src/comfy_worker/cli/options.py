"""The words of the command line: the commands of `comfy-worker`, and an option for each setting.

An option's value goes into the environment under its variable's name, so that every process that is started reads it.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import get_args

from pydantic import AliasChoices, SecretStr
from pydantic.fields import FieldInfo

from comfy_worker.settings import Settings

PROGRAM = "comfy-worker"
COMMANDS = {
    "run": "run one job on ComfyUI and write its outputs into a folder",
    "serve": "serve the HTTP API: the gateway",
    "worker": "run the jobs of gateways with ENGINE=celery, beside a ComfyUI",
    "emulator": "serve ComfyUI's API without ComfyUI, models and GPU, to try things out",
}
_WIDTH = 100
_MISUSED = 2


def choose(arguments: Sequence[str] | None) -> tuple[str, list[str]]:
    """Return the command that is asked for, and its arguments; end the process where there is none, or for `--help`."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND [OPTION VALUE]…",
        description="Turns a ComfyUI workflow into an API.\n\ncommands:\n"
        + "\n".join(f"  {name:{width}}  {what_it_does}" for name, what_it_does in COMMANDS.items()),
        epilog=f"`{PROGRAM} COMMAND --help` names a command's options and their environment variables.",
        formatter_class=_help_of_fixed_width,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        parser.print_help(sys.stderr)
        sys.exit(_MISUSED)
    chosen = parser.parse_args(given)
    return chosen.command, chosen.arguments


def parser_of(command: str, usage: str = "") -> argparse.ArgumentParser:
    """Return a parser for the arguments of a command, which has no options yet; `usage` is what may follow these."""
    sentence = COMMANDS[command]
    return argparse.ArgumentParser(
        prog=f"{PROGRAM} {command}",
        usage=f"{PROGRAM} {command} [OPTION VALUE]… {usage}".rstrip(),
        description=sentence[0].upper() + sentence[1:] + ".",
        formatter_class=_help_of_fixed_width,
        allow_abbrev=False,
    )


def add_settings(parser: argparse.ArgumentParser, title: str, kind: type[Settings]) -> None:
    """Add an option for each setting that only this kind has; secrets are named with their variables."""
    group = parser.add_argument_group(title, "Behind each option stands the environment variable that does the same.")
    secrets = []
    for names, field in _own_settings(kind):
        if _is_secret(field):
            secrets.append((names[0], _help(names, field)))
            continue
        group.add_argument(
            "--" + names[0].lower().replace("_", "-"),
            metavar=names[0],
            dest=names[0],
            help=_help(names, field).replace("%", "%%"),
        )
    lines = [
        textwrap.fill(text, _WIDTH, initial_indent=f"  {name}: ", subsequent_indent="    ") for name, text in secrets
    ]
    told = f"{title}, as environment variables only, because others can read a command line:\n" + "\n".join(lines)
    parser.epilog = f"{parser.epilog}\n\n{told}" if parser.epilog else told


def put_into_environment(options: argparse.Namespace) -> None:
    """Let the settings that were given as options be read from the environment, before those that it had."""
    os.environ.update({name: value for name, value in vars(options).items() if name.isupper() and value is not None})


def _own_settings(kind: type[Settings]) -> Iterator[tuple[list[str], FieldInfo]]:
    shared = {} if kind is Settings else Settings.model_fields
    for name, field in kind.model_fields.items():
        if name not in shared and isinstance(field.validation_alias, AliasChoices):
            yield [str(choice) for choice in field.validation_alias.choices], field


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr in (field.annotation, *get_args(field.annotation))


def _help(names: Sequence[str], field: FieldInfo) -> str:
    default = field.default.value if isinstance(field.default, Enum) else field.default
    told = "not set" if default in (None, "") else str(default)
    also = f"; also read from {', '.join(names[1:])}" if names[1:] else ""
    return f"{field.description} (default: {told}{also})"


def _help_of_fixed_width(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, width=_WIDTH, max_help_position=44)
