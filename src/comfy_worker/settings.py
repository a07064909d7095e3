"""The environment, read once into typed settings.

Each field's description is its documentation: docs/configuration.md lists them all, and a test keeps it so.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from comfy_worker.errors import InvalidInput
from comfy_worker.prefetch import PrefetchMode

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


def _named(*names: str, default: Any, description: str, **limits: Any) -> Any:
    """Return a field that is read from the first of `names` that the environment has."""
    return Field(default=default, validation_alias=AliasChoices(*names), description=description, **limits)


class Settings(BaseSettings):
    """All settings of the worker; every one has a default that works on a desk."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore", populate_by_name=True)

    # ------------------------------------------------------------------------------------------- ComfyUI
    comfyui_url: str = _named(
        "COMFYUI_URL",
        "COMFYUI_API_BASE",
        "COMFY_HOST",
        default="http://127.0.0.1:8188",
        description="Where ComfyUI listens; a bare `host:port` is taken as http.",
    )
    comfyui_ready_timeout_s: float | None = _named(
        "COMFYUI_READY_TIMEOUT_S",
        default=None,
        gt=0,
        description="Seconds to wait for a ComfyUI that does not answer; 300 where start.sh keeps it up, else 10.",
    )
    comfyui_request_timeout_s: float = _named(
        "COMFYUI_REQUEST_TIMEOUT_S",
        default=30.0,
        gt=0,
        description="Seconds that one HTTP request to ComfyUI may go without a byte.",
    )
    comfyui_poll_interval_s: float = _named(
        "COMFYUI_POLL_INTERVAL_S",
        default=3.0,
        gt=0,
        description="Seconds of silence on the websocket after which history and queue are asked.",
    )
    comfyui_lost_after_s: float = _named(
        "COMFYUI_LOST_AFTER_S",
        default=60.0,
        gt=0,
        description="Seconds that a ComfyUI which takes connections may fail to answer during a job.",
    )
    comfyui_stall_timeout_s: float = _named(
        "COMFYUI_STALL_TIMEOUT_S",
        default=900.0,
        gt=0,
        description="Seconds that a running workflow may show no sign of progress.",
    )
    retry_on_crash: bool = _named(
        "RETRY_ON_CRASH",
        default=False,
        description="Run a workflow again, once, that ComfyUI had begun when it died; a job may say `retry_on_crash`.",
    )
    comfyui_pid_file: str | None = _named(
        "COMFYUI_PID_FILE", default=None, description="Where start.sh writes ComfyUI's process id; set by start.sh."
    )
    comfyui_log_file: str | None = _named(
        "COMFYUI_LOG_FILE", default=None, description="Where start.sh keeps the end of ComfyUI's log; set by start.sh."
    )
    comfyui_base_directory: str | None = _named(
        "COMFYUI_BASE_DIRECTORY",
        default=None,
        description="Folder with ComfyUI's input, output and temp, if the worker can reach it; set by start.sh.",
    )
    keep_files: bool = _named(
        "KEEP_FILES", default=False, description="Leave a job's input and output files on ComfyUI's disk."
    )
    min_free_disk_mb: float = _named(
        "MIN_FREE_DISK_MB", default=512.0, ge=0, description="Free MB that ComfyUI's disk needs before a job starts."
    )
    websocket_reconnect_attempts: int = _named(
        "WEBSOCKET_RECONNECT_ATTEMPTS",
        default=5,
        ge=0,
        description="How often a lost websocket is reopened; afterwards the job is followed by polling.",
    )
    websocket_reconnect_delay_s: float = _named(
        "WEBSOCKET_RECONNECT_DELAY_S",
        default=3.0,
        ge=0,
        description="Seconds between two attempts to reopen the websocket; the first is made at once.",
    )
    workflow_timeout_s: float = _named(
        "WORKFLOW_TIMEOUT",
        default=3600.0,
        gt=0,
        description="Seconds that a workflow may take in ComfyUI, unless the job says `timeout_s`.",
    )
    comfy_org_api_key: SecretStr | None = _named(
        "COMFY_ORG_API_KEY",
        default=None,
        description="Key for ComfyUI's paid API nodes, for jobs that bring none.",
    )

    # ------------------------------------------------------------------------------------------------ S3
    bucket_endpoint_url: str | None = _named(
        "BUCKET_ENDPOINT_URL",
        default=None,
        description="S3 endpoint; may carry the bucket in its host or as its path. Outputs go to S3 when it is set.",
    )
    bucket_access_key_id: SecretStr | None = _named(
        "BUCKET_ACCESS_KEY_ID", default=None, description="Access key of the bucket."
    )
    bucket_secret_access_key: SecretStr | None = _named(
        "BUCKET_SECRET_ACCESS_KEY", default=None, description="Secret key of the bucket."
    )
    bucket_name: str | None = _named(
        "BUCKET_NAME", default=None, description="The bucket, where the endpoint does not carry it."
    )
    bucket_region: str | None = _named(
        "BUCKET_REGION", default=None, description="Region, where it cannot be read out of the endpoint."
    )
    bucket_url_expires_s: int = _named(
        "BUCKET_URL_EXPIRES_S",
        default=7 * 24 * 3600,
        ge=1,
        le=7 * 24 * 3600,
        description="Seconds that a presigned URL is good for; S3 allows at most seven days.",
    )

    # -------------------------------------------------------------------------------------------- worker
    prefetch: PrefetchMode = _named(
        "WORKER_PREFETCH",
        default=PrefetchMode.JUST_IN_TIME,
        description="When a RunPod worker takes its next job: `just_in_time`, `eager` (always one ahead) or `off`.",
    )
    refresh_worker: bool = _named(
        "REFRESH_WORKER", default=False, description="Have RunPod replace the worker after each job."
    )
    run_result_limit_mb: float = _named(
        "RUN_RESULT_LIMIT_MB", default=10.0, gt=0, description="Largest result of a job sent to `/run`, in MB."
    )
    runsync_result_limit_mb: float = _named(
        "RUNSYNC_RESULT_LIMIT_MB", default=20.0, gt=0, description="Largest result of a job sent to `/runsync`, in MB."
    )
    warmup_workflow: str | None = _named(
        "WARMUP_WORKFLOW",
        default=None,
        description="Workflow that runs before the first job is taken: JSON, or the name of a file with it.",
    )
    warmup_required: bool = _named(
        "WARMUP_REQUIRED",
        default=False,
        description="A warm-up that fails ends the worker instead of being logged.",
    )
    log_level: LogLevel = _named("LOG_LEVEL", default="INFO", description="Level of the worker's own log.")
    output_dir: str = _named(
        "OUTPUT_DIR",
        default="output",
        description="Where `python handler.py` on a desk writes the outputs.",
    )
    transfer_threads: int = _named(
        "TRANSFER_THREADS",
        default=8,
        ge=1,
        le=64,
        description="How many files are uploaded, fetched or delivered at the same time.",
    )

    @field_validator("comfyui_url")
    @classmethod
    def _complete_url(cls, value: str) -> str:
        url = value if "://" in value else f"http://{value}"
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be a URL such as http://127.0.0.1:8188")
        return url.rstrip("/")

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @property
    def comfyui_address(self) -> str:
        """ComfyUI's `host:port`, as error messages name it."""
        return urlsplit(self.comfyui_url).netloc.rpartition("@")[2]

    @property
    def has_bucket(self) -> bool:
        """Whether outputs go to S3 by default."""
        return self.bucket_endpoint_url is not None

    @property
    def ready_timeout_s(self) -> float:
        """Seconds to wait for ComfyUI: long where it is being started, short where nothing will start it."""
        return self.comfyui_ready_timeout_s or (300.0 if self.comfyui_pid_file else 10.0)

    def secrets(self) -> list[str]:
        """Return every secret value, for masking."""
        values = (self.comfy_org_api_key, self.bucket_access_key_id, self.bucket_secret_access_key)
        return [value.get_secret_value() for value in values if value is not None]


def load_settings(**overrides: Any) -> Settings:
    """Read the environment; `overrides` are fields by their names.

    Raises:
        InvalidInput: a variable has a value that it cannot have; the sentence names each, without its value.
    """
    try:
        settings = Settings(**overrides)
    except ValidationError as error:
        problems = [f"{item['loc'][0]}: {item['msg']}" for item in error.errors()]
        raise InvalidInput(f"Invalid settings: {'; '.join(problems)}") from None
    _check_bucket(settings)
    return settings


def _check_bucket(settings: Settings) -> None:
    """Refuse half a set of S3 settings: it would silently deliver base64 to someone who waits for URLs."""
    needed: Mapping[str, object] = {
        "BUCKET_ENDPOINT_URL": settings.bucket_endpoint_url,
        "BUCKET_ACCESS_KEY_ID": settings.bucket_access_key_id,
        "BUCKET_SECRET_ACCESS_KEY": settings.bucket_secret_access_key,
    }
    missing = [name for name, value in needed.items() if value is None]
    if missing and len(missing) < len(needed):
        raise InvalidInput(f"S3 is only half configured: {' and '.join(missing)} must be set too")


def describe() -> str:
    """Return the table of all settings for docs/configuration.md, in Markdown."""
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for field in Settings.model_fields.values():
        choices = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
        names = [f"`{name}`" for name in choices]
        also = f" Also read from {', '.join(names[1:])}." if names[1:] else ""
        value = field.default.value if isinstance(field.default, Enum) else field.default
        default = "not set" if value is None else f"`{value}`"
        rows.append(f"| {names[0]} | {default} | {field.description}{also} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(describe())  # noqa: T201 - this is its answer
