"""The command `comfy-worker`, which is also `python -m comfy_worker`."""

from __future__ import annotations

from collections.abc import Sequence

from comfy_worker.startup import exit_code_of, run_until_signal


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command until it is done or until a signal, and return the exit code of the process."""
    return exit_code_of(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    from comfy_worker.cli import options

    command, rest = options.parse_command(arguments)
    if command == "run":
        return _run_job(rest)
    if command == "emulator":
        from comfy_emulator import __main__ as emulator

        emulator.main(rest, program="comfy-worker emulator")
        return 0
    return run_until_signal(lambda: _serve_or_work(command, rest))


def _run_job(arguments: Sequence[str]) -> int:
    from comfy_worker.cli import handler, options, run
    from comfy_worker.settings import Settings

    parser = options.parser_of("run", "[FILE]")
    run.add_arguments(parser)
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        default=run.DEFAULT_FILE,
        help=f"JSON file with such a job (default: {run.DEFAULT_FILE})",
    )
    options.add_settings(parser, "settings of the worker", Settings)
    given = parser.parse_args(arguments)
    options.put_into_environment(given)
    return run.main(given.test_input, given.file, handler.prepare())


def _serve_or_work(command: str, arguments: Sequence[str]) -> int:
    from comfy_worker.cli import options
    from comfy_worker.env_file import read_env_file
    from comfy_worker.gateway.serve import serve, work
    from comfy_worker.gateway.settings import GatewaySettings
    from comfy_worker.settings import Settings

    parser = options.parser_of(command)
    options.add_settings(parser, "settings of the gateway", GatewaySettings)
    options.add_settings(parser, "settings of the worker", Settings)
    options.put_into_environment(parser.parse_args(arguments))
    read_env_file()
    return serve() if command == "serve" else work()
