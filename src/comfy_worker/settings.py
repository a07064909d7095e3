"""The environment, read once into typed settings.

Each field's description is its documentation: docs/reference/configuration.md lists them all, and a test keeps it so.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from comfy_worker.errors import InvalidInput
from comfy_worker.types import DeliveryType

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]

AnySettings = TypeVar("AnySettings", bound="Settings")


def _named(*names: str, default: Any, description: str, **limits: Any) -> Any:
    """Return a field that is read from the first of `names` that the environment has."""
    return Field(default=default, validation_alias=AliasChoices(*names), description=description, **limits)


class PrefetchMode(str, Enum):
    """How far ahead a worker takes jobs."""

    JUST_IN_TIME = "just_in_time"
    EAGER = "eager"
    OFF = "off"


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

    keep_metadata: bool = _named(
        "KEEP_METADATA",
        default=False,
        description="Leave the workflow and the prompt in outputs; a job may say `convert.keep_metadata` for pictures.",
    )

    # -------------------------------------------------------------------------------------------- inputs
    input_max_files: int = _named(
        "INPUT_MAX_FILES", default=64, ge=1, description="Most input files of a job, including those at URLs."
    )
    input_max_mb: float = _named("INPUT_MAX_MB", default=1024.0, gt=0, description="Largest input file, in MB.")
    input_fetch_timeout_s: float = _named(
        "INPUT_FETCH_TIMEOUT_S", default=300.0, gt=0, description="Seconds that fetching one input by URL may take."
    )
    input_cache_dir: str | None = _named(
        "INPUT_CACHE_DIR",
        default=None,
        description="Where fetched inputs are kept for later jobs; a folder of the system's temporary one if not set.",
    )
    input_cache_mb: float = _named(
        "INPUT_CACHE_MB",
        default=2048.0,
        ge=0,
        description="How many MB of fetched inputs are kept, the least recently used go first; 0 keeps none.",
    )
    allow_private_urls: bool = _named(
        "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS",
        default=False,
        description="Fetch inputs from, and send webhooks to, addresses that are not public.",
    )

    # ----------------------------------------------------------------------------------------- workflows
    workflows_dir: str = _named(
        "WORKFLOWS_DIR",
        default="workflows",
        description="Folder with the named workflows that a job may call as its `template`.",
    )

    # ------------------------------------------------------------------------------------------ delivery
    delivery: DeliveryType | None = _named(
        "DELIVERY",
        "STORAGE_TYPE",
        default=None,
        description="How outputs are delivered where the job does not say: `auto`, `base64`, `s3`, `both` or `local`; "
        "if not set, `s3` where there is a bucket and `base64` where there is none.",
    )
    local_delivery_dir: str | None = _named(
        "LOCAL_DELIVERY_DIR", default=None, description="Folder for outputs that are delivered as `local`."
    )
    local_delivery_url: str | None = _named(
        "LOCAL_DELIVERY_URL", default=None, description="Where that folder is served; the outputs' URLs begin with it."
    )

    # ------------------------------------------------------------------------------------------------ S3
    bucket_endpoint_url: str | None = _named(
        "BUCKET_ENDPOINT_URL",
        "S3_ENDPOINT_URL",
        default=None,
        description="S3 endpoint; may carry the bucket in its host or as its path. Outputs go to S3 when it is set.",
    )
    bucket_access_key_id: SecretStr | None = _named(
        "BUCKET_ACCESS_KEY_ID",
        "S3_ACCESS_KEY_ID",
        "S3_ACCESS_KEY",
        default=None,
        description="Access key of the bucket.",
    )
    bucket_secret_access_key: SecretStr | None = _named(
        "BUCKET_SECRET_ACCESS_KEY",
        "S3_SECRET_ACCESS_KEY",
        "S3_SECRET_KEY",
        default=None,
        description="Secret key of the bucket.",
    )
    bucket_name: str | None = _named(
        "BUCKET_NAME",
        "S3_BUCKET_NAME",
        default=None,
        description="The bucket, where the endpoint does not carry it; else the one of the month (`11-26`).",
    )
    bucket_region: str | None = _named(
        "BUCKET_REGION",
        "S3_REGION",
        "S3_REGION_NAME",
        default=None,
        description="Region, where it cannot be read out of the endpoint.",
    )
    bucket_addressing: Literal["auto", "path", "virtual"] = _named(
        "BUCKET_ADDRESSING",
        default="auto",
        description="Whether the bucket stands in the path or the host of a request; `auto` knows the large services.",
    )
    bucket_key_template: str = _named(
        "BUCKET_KEY_TEMPLATE",
        default="{job_id}/{filename}",
        description="Key of an output, with `{job_id}`, `{filename}`, `{node_id}`, `{index}`, `{date}`, `{prefix}`.",
    )
    bucket_public_url: str | None = _named(
        "BUCKET_PUBLIC_URL",
        default=None,
        description="Where the bucket is public; outputs get this URL with their key instead of a presigned one.",
    )
    bucket_acl: str | None = _named(
        "BUCKET_ACL", default=None, description="Canned ACL of outputs, such as `public-read`."
    )
    bucket_encryption: Literal["AES256", "aws:kms"] | None = _named(
        "BUCKET_ENCRYPTION", default=None, description="Server-side encryption of outputs: `AES256` or `aws:kms`."
    )
    bucket_kms_key_id: str | None = _named(
        "BUCKET_KMS_KEY_ID", default=None, description="Key for `aws:kms`, if not the account's own."
    )
    bucket_part_mb: int = _named(
        "BUCKET_PART_MB", default=8, ge=5, le=64, description="Size of the parts in which large outputs are uploaded."
    )
    allow_job_bucket: bool = _named(
        "ALLOW_JOB_S3",
        default=True,
        description="Whether a job may bring a bucket of its own (`s3`, `s3Config`), at a public address.",
    )
    job_bucket_endpoints: str = _named(
        "JOB_S3_ENDPOINTS",
        default="",
        description="Hosts of the endpoints that such a bucket may have, separated by commas, with `*`; empty for any "
        "public address.",
    )
    bucket_url_expires_s: int = _named(
        "BUCKET_URL_EXPIRES_S",
        default=7 * 24 * 3600,
        ge=1,
        le=7 * 24 * 3600,
        description="Seconds that a presigned URL is good for; S3 allows at most seven days.",
    )

    # ------------------------------------------------------------------------------------------ webhooks
    webhook_url: str | None = _named(
        "WEBHOOK_URL", default=None, description="Is told of every job's end, unless the job names another."
    )
    webhook_secret: SecretStr | None = _named(
        "WEBHOOK_SECRET",
        default=None,
        description="Signs webhooks: `whsec_…` as Standard Webhooks describes, other text as AI-Dock's wrapper does.",
    )
    webhook_timeout_s: float = _named(
        "WEBHOOK_TIMEOUT", default=30.0, gt=0, description="Seconds that a webhook's receiver may take to answer."
    )
    webhook_attempts: int = _named(
        "WEBHOOK_ATTEMPTS", default=5, ge=1, le=20, description="How often a webhook is sent until it is accepted."
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
    log_level: LogLevel = _named(
        "LOG_LEVEL", "API_LOG_LEVEL", default="INFO", description="Level of the worker's own log."
    )
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
        description="How many files of a job are fetched and uploaded at the same time, and how many of all jobs are "
        "delivered.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _not_a_placeholder(cls, value: object) -> object:
        if isinstance(value, str) and value.endswith("…"):
            raise ValueError("is the placeholder of an example: put a value of your own there")
        return value

    @field_validator("comfyui_url")
    @classmethod
    def _complete_url(cls, value: str) -> str:
        return complete_url(value)

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
        values = (
            self.comfy_org_api_key,
            self.bucket_access_key_id,
            self.bucket_secret_access_key,
            self.webhook_secret,
        )
        own = [value.get_secret_value() for value in values if value is not None]
        return [*own, *passwords_of(self.comfyui_url)]


def complete_url(value: str) -> str:
    """Return where a ComfyUI listens as a URL without a closing slash; a bare `host:port` is taken as http.

    Raises:
        ValueError: it is neither.
    """
    url = value if "://" in value else f"http://{value}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL such as http://127.0.0.1:8188")
    return url.rstrip("/")


def without_credentials(url: str) -> str:
    """Return a URL without the user and the password that may stand in it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def passwords_of(url: str) -> list[str]:
    """Return the password in a URL, as it is written there and as it is meant; nothing if there is none."""
    password = urlsplit(url).password
    return list(dict.fromkeys((password, unquote(password)))) if password else []


def load_settings(**overrides: Any) -> Settings:
    """Read the environment; `overrides` are fields by their names.

    Raises:
        InvalidInput: a variable has a value that it cannot have; the sentence names each, without its value.
    """
    return read_settings(Settings, overrides)


def read_settings(kind: type[AnySettings], overrides: Mapping[str, Any]) -> AnySettings:
    """Read the settings of one kind out of the environment, as `load_settings` does."""
    try:
        settings = kind(**overrides)
    except ValidationError as error:
        problems = [
            f"{_variable_of(kind, str(item['loc'][0]))}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        raise InvalidInput(f"Invalid settings: {'; '.join(problems)}") from None
    _check_bucket(settings)
    return settings


def _variable_of(kind: type[Settings], name: str) -> str:
    """Return the variable's name: a value that nobody gave is refused by the name of its field."""
    field = kind.model_fields.get(name)
    choices = field.validation_alias.choices if field and isinstance(field.validation_alias, AliasChoices) else [name]
    return str(choices[0])


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


def describe(kind: type[Settings] = Settings) -> str:
    """Return the table of the settings that only this kind has, in Markdown, for the documentation."""
    shared = {} if kind is Settings else Settings.model_fields
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for name, field in kind.model_fields.items():
        if name in shared:
            continue
        choices = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
        names = [f"`{name}`" for name in choices]
        also = f" Also read from {', '.join(names[1:])}." if names[1:] else ""
        value = field.default.value if isinstance(field.default, Enum) else field.default
        default = "not set" if value in (None, "") else f"`{value}`"
        rows.append(f"| {names[0]} | {default} | {field.description}{also} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(describe())  # noqa: T201 - this is its answer
