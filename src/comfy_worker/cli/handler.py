"""`python handler.py`: a RunPod worker, RunPod's local API, or one job on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from comfy_worker.env_file import read_env_file
from comfy_worker.logs import configure_logs
from comfy_worker.settings import Settings, load_settings
from comfy_worker.startup import exit_code_of
from comfy_worker.storage import StorageFactory
from comfy_worker.webhooks.worker_webhooks import Webhooks


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run until the worker, the API or the job ends, and return the exit code of the process."""
    return exit_code_of(lambda: _run(arguments, environment))


def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    if is_local_run(arguments, environment):
        from comfy_worker.cli import run

        job = run.parse_test_input(arguments)
        return run.main(job, run.DEFAULT_FILE, prepare())
    from comfy_worker.serverless.start import start

    start(prepare())
    return 0


def prepare() -> Settings:
    """Read the settings, check them and configure the log.

    Raises:
        InvalidInput: a setting is invalid, including those that would otherwise fail a job later.
    """
    read_env_file()
    settings = load_settings()
    StorageFactory(settings).check()
    Webhooks(settings).close()
    configure_logs(settings.log_level, settings.secrets())
    return settings


def is_local_run(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Return whether to run one job on this machine: with `--test_input`, or if nothing else is requested.

    The conditions are those of RunPod's SDK.
    """
    names = {argument.partition("=")[0] for argument in arguments}
    if "--test_input" in names:
        return True
    serves = "--rp_serve_api" in names or environment.get("RUNPOD_REALTIME_PORT", "0") != "0"
    return not serves and "RUNPOD_WEBHOOK_GET_JOB" not in environment
