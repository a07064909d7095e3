"""docker-compose.yml as Docker Compose reads it: with its anchors, its variables filled in, and one profile of it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.settings import Settings, list_settings
from tests.support.paths import ROOT
from tests.support.waiting import TIMEOUT_S

COMPOSE = ROOT / "docker-compose.yml"
EXAMPLE = ROOT / ".env.example"
OWN_IMAGE = "comfy-worker:"
PROFILES = ("single", "demo", "fleet", "fleet-demo", "worker")

_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_LINE = re.compile(r"(?m)^(# )?([A-Z][A-Z0-9_]*)=(\S*)")


class MissingVariable(Exception):
    """One with `:?` is not set."""


def raw() -> dict[str, Any]:
    """Return the file as it is."""
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return loaded


def read(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the file with its variables filled in.

    Raises:
        MissingVariable: one is needed that is not there, whatever the profile: Compose fills in all of the file.
    """
    filled: dict[str, Any] = _fill_in(raw(), environment)
    return filled


def complete() -> dict[str, Any]:
    """Return the file with an environment that has no more than is needed."""
    return read({name: f"{name.lower().replace('_', '')}0" for name in needed()})


def services(file: Mapping[str, Any], profile: str) -> dict[str, dict[str, Any]]:
    """Return the services of a profile."""
    return {name: service for name, service in file["services"].items() if profile in service["profiles"]}


def needed() -> set[str]:
    """Return the variables that .env.example leaves empty."""
    return {name for comment, name, value in _LINE.findall(EXAMPLE.read_text(encoding="utf-8")) if not comment}


def optional() -> dict[str, str]:
    """Return the variables that .env.example has in comments, with the default that it tells."""
    return {name: value for comment, name, value in _LINE.findall(EXAMPLE.read_text(encoding="utf-8")) if comment}


def variables() -> Iterator[tuple[str, str, str]]:
    """Return name, operator and word of each variable in the file."""
    for text in _strings(raw()):
        yield from _variables(text)


def setting_names() -> set[str]:
    """Return what the worker, the gateway and start.sh read of the environment."""
    settings = {
        name for kind in (Settings, GatewaySettings) for setting in list_settings(kind) for name in setting.variables
    }
    return settings | set(re.findall(r"\$\{([A-Z][A-Z_]*):?-", (ROOT / "start.sh").read_text(encoding="utf-8")))


def run_make_env(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run deploy/make-env in a folder with a copy of it."""
    return subprocess.run(
        [folder / "deploy/make-env"], cwd=folder.parent, text=True, capture_output=True, timeout=TIMEOUT_S, check=False
    )


def _strings(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict):
        for value in part.values():
            yield from _strings(value)
    elif isinstance(part, list):
        for value in part:
            yield from _strings(value)


def _fill_in(part: Any, environment: Mapping[str, str]) -> Any:
    if isinstance(part, str):
        return _filled(part, environment)
    if isinstance(part, dict):
        return {key: _fill_in(value, environment) for key, value in part.items()}
    return [_fill_in(value, environment) for value in part] if isinstance(part, list) else part


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """Cut a text into what stands in it and the insides of its `${…}`, which may nest."""
    while text:
        before, found, rest = text.partition("$")
        yield "text", before
        if not found:
            return
        if rest.startswith("$"):
            yield "text", "$"
            text = rest[1:]
            continue
        assert rest.startswith("{"), f"only ${{NAME}} is used here, not ${rest[:10]}"
        end = _end_of(rest)
        yield "variable", rest[1:end]
        text = rest[end + 1 :]


def _end_of(text: str) -> int:
    """Return where the brace ends that a text begins with."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return place
    raise AssertionError(f"a brace is not closed: {text}")


def _take_apart(inside: str) -> tuple[str, str, str]:
    name = _NAME.match(inside)
    assert name, inside
    rest = inside[name.end() :]
    assert rest[:2] in ("", ":-", ":?"), inside
    return name[0], rest[:2], rest[2:]


def _variables(text: str) -> Iterator[tuple[str, str, str]]:
    for kind, piece in _pieces(text):
        if kind == "variable":
            name, operator, word = _take_apart(piece)
            yield name, operator, word
            if operator == ":-":
                yield from _variables(word)


def _filled(text: str, environment: Mapping[str, str]) -> str:
    filled = ""
    for kind, piece in _pieces(text):
        if kind == "text":
            filled += piece
            continue
        name, operator, word = _take_apart(piece)
        if environment.get(name):
            filled += environment[name]
        elif operator == ":-":
            filled += _filled(word, environment)
        else:
            raise MissingVariable(name)
    return filled
