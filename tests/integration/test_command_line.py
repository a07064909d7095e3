"""`comfy-worker`: what its help names, and what its options do."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from comfy_worker.cli.main import add_settings, parser_of, put_into_environment
from comfy_worker.gateway.settings import GatewaySettings, load_gateway_settings
from comfy_worker.settings import Setting, Settings, list_settings
from tests.support.paths import ROOT
from tests.support.processes.process import Process

PROGRAM = [sys.executable, "-m", "comfy_worker"]
ENVIRONMENT = {"PYTHONPATH": str(ROOT / "src")}
SETTINGS_OF = [("run", Settings), ("serve", GatewaySettings), ("worker", GatewaySettings)]


def says(folder: Path, *arguments: str | Path) -> tuple[int, str, str]:
    """Return the exit code, the output and the errors of a command that is run in an empty folder and leaves it so."""
    folder.mkdir()
    with Process(arguments, environment=ENVIRONMENT, cwd=folder) as process:
        code = process.wait()
        assert list(folder.iterdir()) == []
        return code, process.stdout, process.stderr


def settings_of(kind: type[Settings]) -> list[Setting]:
    return [*list_settings(Settings), *(list_settings(kind) if kind is not Settings else ())]


def test_it_is_a_command() -> None:
    [target] = re.findall(r'^comfy-worker = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_its_help_names_the_commands(tmp_path: Path) -> None:
    code, stdout, _ = says(tmp_path / "empty", *PROGRAM, "--help")
    assert code == 0
    assert re.findall(r"^  ([a-z]+)  ", stdout, re.MULTILINE) == ["run", "serve", "worker", "emulator"]
    code, _, errors = says(tmp_path / "none", *PROGRAM)
    assert (code, errors) == (2, stdout)


@pytest.mark.parametrize(("command", "kind"), SETTINGS_OF)
def test_a_commands_help_names_every_setting_with_its_variables_and_its_default(
    tmp_path: Path, command: str, kind: type[Settings]
) -> None:
    code, stdout, _ = says(tmp_path / "empty", *PROGRAM, command, "--help")
    assert code == 0
    stdout = re.sub(r"\s+", " ", stdout)
    for setting in settings_of(kind):
        name, *others = setting.variables
        option = "--" + name.lower().replace("_", "-")
        assert (f"{option} {name} " in stdout) != setting.is_secret, name
        assert f"{name}: " in stdout or not setting.is_secret, name
        also = f"; also read from {', '.join(others)}" if others else ""
        assert f"(default: {setting.default or 'not set'}{also})" in stdout, name


def test_the_emulators_help_names_its_options(tmp_path: Path) -> None:
    code, stdout, _ = says(tmp_path / "empty", *PROGRAM, "emulator", "--help")
    assert code == 0
    assert stdout.startswith("usage: comfy-worker emulator ")
    assert "--base-directory DIR" in stdout


@pytest.mark.parametrize("program", ["handler.py", "deploy/make-env"])
def test_the_help_of_other_commands_writes_nothing(tmp_path: Path, program: str) -> None:
    before = (ROOT / ".env").exists()
    command = [sys.executable, ROOT / program] if program.endswith(".py") else [ROOT / program]
    code, stdout, _ = says(tmp_path / "empty", *command, "--help")
    assert code == 0
    assert "usage: " in stdout.lower()
    assert (ROOT / ".env").exists() == before


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_handler_without_its_packages_names_the_command_to_run(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, stdout, errors = says(tmp_path / "empty", sys.executable, "-S", ROOT / "handler.py", *arguments)
    assert (code, stdout) == (1, "")
    assert re.fullmatch(
        r"The package \w+ is not installed for \S+: run `make install` in the folder of handler\.py, then "
        r"`\.venv/bin/python handler\.py`\.\n",
        errors,
    )


def test_an_option_overrides_its_variable(environment: pytest.MonkeyPatch) -> None:
    for name, value in (("API_PORT", "1"), ("API_RELOAD", "false"), ("MAX_QUEUE_SIZE", "7")):
        environment.setenv(name, value)
    parser = parser_of("serve")
    add_settings(parser, "settings", GatewaySettings)
    put_into_environment(parser.parse_args(["--api-port", "2", "--api-reload=true"]))
    settings = load_gateway_settings()
    assert (settings.api_port, settings.api_reload, settings.max_queue_size) == (2, True, 7)


@pytest.mark.parametrize("command", ["run", "serve", "worker"])
def test_an_invalid_value_is_rejected_by_its_variables_name(tmp_path: Path, command: str) -> None:
    code, stdout, errors = says(tmp_path / "empty", *PROGRAM, command, "--workflow-timeout", "soon")
    assert (code, stdout) == (2, "")
    assert re.fullmatch(r"Invalid settings: .*WORKFLOW_TIMEOUT: Input should be a valid number.*\n", errors)


@pytest.mark.parametrize(
    ("package", "command", "source"),
    [
        ("fastapi", "serve", "-r requirements.txt"),
        ("celery", "worker", "'.[fleet]'"),
        ("aiohttp", "emulator", "'.[emulator]'"),
    ],
)
def test_missing_packages_are_named_with_their_install_command(
    tmp_path: Path, package: str, command: str, source: str
) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None; from comfy_worker.cli.main import main; "
        f"sys.exit(main([{command!r}]))"
    )
    with Process(
        [sys.executable, "-c", program],
        environment={
            **ENVIRONMENT,
            "ENGINE": "celery",
            "DATABASE_URL": "postgresql://nowhere/jobs",
            "DATA_DIR": str(tmp_path),
        },
        cwd=tmp_path,
    ) as process:
        assert process.wait() == 2
        assert process.output == (
            f"The package {package} is not installed, which comfy-worker needs for this: run `pip install {source}` in "
            "the folder of its pyproject.toml.\n"
        )
