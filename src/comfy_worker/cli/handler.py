"""Decides what `python handler.py` is: a RunPod worker, an HTTP API or one job on a desk."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from comfy_worker.env_file import read_env_file
from comfy_worker.errors import WorkerError
from comfy_worker.logs import configure_logs
from comfy_worker.settings import Settings, load_settings
from comfy_worker.storage import StorageFactory
from comfy_worker.webhooks import Webhooks

_NOT_SOUND = 2


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run until the end of the worker, the API or the job; return the process's exit code."""
    settings = _sound_settings()
    if settings is None:
        return _NOT_SOUND
    if is_local_run(arguments, environment):
        from comfy_worker.cli import run

        configure_logs(settings.log_level, settings.secrets())
        return run.main(run.test_input_of(arguments), run.FILE, settings)
    from comfy_worker.serverless.start import start

    start(settings)
    return 0


def run_local_job(text: str | None, file: str) -> int:
    """Run one job here, that in `text` or else of a file; return the process's exit code."""
    from comfy_worker.cli import run

    settings = _sound_settings()
    if settings is None:
        return _NOT_SOUND
    configure_logs(settings.log_level, settings.secrets())
    return run.main(text, file, settings)


def _sound_settings() -> Settings | None:
    """Return the settings; where they are not sound, say why and return None."""
    try:
        read_env_file()
        settings = load_settings()
        # What can only fail later is refused now, before a job has been run for nothing.
        StorageFactory(settings).check()
        Webhooks(settings).close()
    except WorkerError as error:
        print(error.message, file=sys.stderr)
        return None
    return settings


def is_local_run(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Return whether one job is to be run here: asked for by `--test_input`, or nothing else is asked for.

    The conditions are the RunPod SDK's.
    """
    names = {argument.partition("=")[0] for argument in arguments}
    if "--test_input" in names:
        return True
    serves = "--rp_serve_api" in names or environment.get("RUNPOD_REALTIME_PORT", "0") != "0"
    return not serves and "RUNPOD_WEBHOOK_GET_JOB" not in environment
