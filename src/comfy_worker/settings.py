"""The worker's settings, read once from the environment.

A field is read from the variable of its name in capitals, unless it lists others. Its docstring is its documentation,
in `--help` and in docs/reference/configuration.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, get_args
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from comfy_worker.errors import InvalidInput
from comfy_worker.types import DeliveryType

CannedAcl = Literal[
    "private",
    "public-read",
    "public-read-write",
    "authenticated-read",
    "aws-exec-read",
    "bucket-owner-read",
    "bucket-owner-full-control",
]
"""From the documentation of S3's PutObject."""
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(str.upper)]
AboveZero = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]

_BASE_URL = re.compile(r"https?://([^\x00- /?#@:\[\]\\]+|\[[0-9a-fA-F:.]+\])(:[1-9]\d{0,4})?(/[^\x00- ?#\\]*)?")
"""A URL to which a path can be appended."""


def complete_url(value: str) -> str:
    """Return the URL of a ComfyUI without a slash at its end; a bare `host:port` means http.

    Raises:
        ValueError: the value is neither.
    """
    url = value if "://" in value else f"http://{value}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL such as http://127.0.0.1:8188")
    return url.rstrip("/")


def _check_base_url(value: str) -> str:
    if not _BASE_URL.fullmatch(value):
        raise ValueError("must be an http or https URL without a user, '?' and '#'")
    return value


BaseUrl = Annotated[str, AfterValidator(_check_base_url)]

AnySettings = TypeVar("AnySettings", bound="Settings")


def read_from(*variables: str, default: Any) -> Any:
    """Return a field that is read from the first of `variables` that is set."""
    return Field(default=default, validation_alias=AliasChoices(*variables))


class PrefetchMode(str, Enum):
    """How far ahead a worker takes jobs."""

    JUST_IN_TIME = "just_in_time"
    EAGER = "eager"
    OFF = "off"


class Settings(BaseSettings):
    """The settings of the worker. Each has a default, so that an empty environment works on a developer's machine."""

    model_config = SettingsConfigDict(
        frozen=True, env_ignore_empty=True, extra="ignore", populate_by_name=True, use_attribute_docstrings=True
    )

    # ------------------------------------------------------------------------------------------- ComfyUI
    comfyui_url: Annotated[str, AfterValidator(complete_url)] = read_from(
        "COMFYUI_URL", "COMFYUI_API_BASE", "COMFY_HOST", default="http://127.0.0.1:8188"
    )
    """URL of ComfyUI; a bare `host:port` means http."""
    comfyui_ready_timeout_s: AboveZero | None = None
    """Seconds to wait for a ComfyUI that does not answer; if not set, 300 where start.sh runs ComfyUI, else 10."""
    comfyui_request_timeout_s: AboveZero = 30.0
    """Seconds without a byte after which an HTTP request to ComfyUI fails."""
    comfyui_poll_interval_s: AboveZero = 3.0
    """Seconds of silence on the websocket after which the worker asks for history and queue."""
    comfyui_lost_after_s: AboveZero = 60.0
    """Seconds for which a ComfyUI that accepts connections may leave a job's requests unanswered."""
    comfyui_stall_timeout_s: AboveZero = 900.0
    """Seconds for which a running workflow may show no progress."""
    retry_on_crash: bool = False
    """Run a workflow once more if ComfyUI dies while running it; a job can set `retry_on_crash` itself."""
    comfyui_pid_file: str | None = None
    """File with ComfyUI's process id; set by start.sh."""
    comfyui_log_file: str | None = None
    """File with the end of ComfyUI's log; set by start.sh."""
    comfyui_base_directory: str | None = None
    """Folder that contains ComfyUI's input, output and temp folders, if the worker can reach it; set by start.sh."""
    min_free_disk_mb: NotNegative = 512.0
    """Free space in MiB that ComfyUI's disk needs before a job starts."""
    websocket_reconnect_attempts: Annotated[int, Field(ge=0)] = 5
    """How often a lost websocket is reopened before the worker falls back to polling."""
    websocket_reconnect_delay_s: NotNegative = 3.0
    """Seconds between two attempts to reopen the websocket; the first one is immediate."""
    workflow_timeout_s: AboveZero = read_from("WORKFLOW_TIMEOUT", default=3600.0)
    """Seconds that a workflow may take in ComfyUI; a job can set `timeout_s` itself."""
    comfy_org_api_key: SecretStr | None = None
    """Key for ComfyUI's paid API nodes, for jobs without one of their own."""
    keep_metadata: bool = False
    """Keep the workflow and the prompt in output files; a job can set `convert.keep_metadata` for its images."""

    # -------------------------------------------------------------------------------------------- inputs
    input_max_files: Annotated[int, Field(ge=1)] = 64
    """Largest number of input files of a job, including those at URLs."""
    input_max_mb: AboveZero = 1024.0
    """Largest input file in MiB."""
    input_fetch_timeout_s: AboveZero = 300.0
    """Seconds that the download of one input may take."""
    input_cache_dir: str | None = None
    """Folder in which downloaded inputs are cached; if not set, one in the system's folder for temporary files."""
    input_cache_mb: NotNegative = 2048.0
    """Size of that cache in MiB; the least recently used files are removed first, and 0 disables it."""
    allow_private_urls: bool = read_from("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", default=False)
    """Allow input URLs and webhooks with addresses that are not public."""

    # ----------------------------------------------------------------------------------------- workflows
    workflows_dir: str = "workflows"
    """Folder with the named workflows that a job can use as its `template`."""

    # ------------------------------------------------------------------------------------------ delivery
    delivery: DeliveryType | None = read_from("DELIVERY", "STORAGE_TYPE", default=None)
    """How outputs are delivered unless the job says: `auto`, `base64`, `s3`, `both` or `local`; if not set, `s3` with
    a bucket and `base64` without one."""
    local_delivery_dir: str | None = None
    """Folder for outputs that are delivered as `local`."""
    local_delivery_url: BaseUrl | None = None
    """URL at which that folder is served; the URLs of outputs begin with it."""

    # ------------------------------------------------------------------------------------------------ S3
    bucket_endpoint_url: str | None = read_from("BUCKET_ENDPOINT_URL", "S3_ENDPOINT_URL", default=None)
    """S3 endpoint, which can contain the bucket as a part of its host or as its path; enables uploads to S3."""
    bucket_access_key_id: SecretStr | None = read_from(
        "BUCKET_ACCESS_KEY_ID", "S3_ACCESS_KEY_ID", "S3_ACCESS_KEY", default=None
    )
    """Access key of the bucket."""
    bucket_secret_access_key: SecretStr | None = read_from(
        "BUCKET_SECRET_ACCESS_KEY", "S3_SECRET_ACCESS_KEY", "S3_SECRET_KEY", default=None
    )
    """Secret key of the bucket."""
    bucket_name: str | None = read_from("BUCKET_NAME", "S3_BUCKET_NAME", default=None)
    """Name of the bucket; if neither this nor the endpoint names one, the bucket is named after the month (`11-26`)."""
    bucket_region: str | None = read_from("BUCKET_REGION", "S3_REGION", "S3_REGION_NAME", default=None)
    """Region of the bucket, if the endpoint does not show it."""
    bucket_key_template: str = "{job_id}/{filename}"
    """Key of an output, with `{job_id}`, `{filename}`, `{node_id}`, `{index}`, `{date}` and `{prefix}`."""
    bucket_public_url: BaseUrl | None = None
    """Public URL of the bucket; outputs then get this URL and their key instead of a presigned URL."""
    bucket_acl: CannedAcl | None = None
    """Canned ACL of outputs, such as `public-read`."""
    bucket_url_expires_s: Annotated[int, Field(ge=1, le=7 * 24 * 3600)] = 7 * 24 * 3600
    """Seconds until a presigned URL expires; S3 allows at most seven days."""
    allow_job_bucket: bool = read_from("ALLOW_JOB_S3", default=True)
    """Allow jobs to bring a bucket of their own (`s3`, `s3Config`) at a public address."""
    job_bucket_endpoints: str = read_from("JOB_S3_ENDPOINTS", default="")
    """Hosts that such a bucket's endpoint may have, separated by commas, with `*`; any public address if not set."""

    # ------------------------------------------------------------------------------------------ webhooks
    webhook_url: str | None = None
    """URL that receives a POST when a job ends, unless the job has a webhook of its own."""
    webhook_secret: SecretStr | None = None
    """Secret that signs these webhooks: `whsec_…` as Standard Webhooks defines, any other text as AI-Dock does."""
    webhook_timeout_s: AboveZero = read_from("WEBHOOK_TIMEOUT", default=30.0)
    """Seconds that a receiver may take to answer a webhook."""
    webhook_attempts: Annotated[int, Field(ge=1, le=20)] = 5
    """How often a webhook is sent if it is not accepted."""

    # -------------------------------------------------------------------------------------------- worker
    prefetch: PrefetchMode = read_from("WORKER_PREFETCH", default=PrefetchMode.JUST_IN_TIME)
    """When a RunPod worker takes its next job: `just_in_time`, `eager` (always one ahead) or `off`."""
    refresh_worker: bool = False
    """Have RunPod replace the worker after each job."""
    run_result_limit_mb: AboveZero = 10.0
    """Largest result of a job sent to `/run`, in MB of 1,000,000 bytes."""
    runsync_result_limit_mb: AboveZero = 20.0
    """Largest result of a job sent to `/runsync`, in MB of 1,000,000 bytes."""
    warmup_workflow: str | None = None
    """Workflow that runs before the first job is taken: JSON, or the name of a JSON file."""
    log_level: LogLevel = read_from("LOG_LEVEL", "API_LOG_LEVEL", default="INFO")
    """Level of the worker's log."""
    output_dir: str = "output"
    """Folder into which a local run (`python handler.py`, `comfy-worker run`) writes the outputs."""

    @field_validator("*", mode="before")
    @classmethod
    def _not_a_placeholder(cls, value: object) -> object:
        if isinstance(value, str) and value.endswith("…"):
            raise ValueError("is the placeholder of an example: put a value of your own there")
        return value

    @property
    def comfyui_address(self) -> str:
        """ComfyUI's `host:port`, for error messages."""
        return urlsplit(self.comfyui_url).netloc.rpartition("@")[2]

    @property
    def has_bucket(self) -> bool:
        """Whether outputs go to S3 by default."""
        return self.bucket_endpoint_url is not None

    @property
    def ready_timeout_s(self) -> float:
        """Seconds to wait for ComfyUI: many while start.sh starts it, few otherwise."""
        return self.comfyui_ready_timeout_s or (300.0 if self.comfyui_pid_file else 10.0)

    def secrets(self) -> list[str]:
        """Return all secret values, so that they can be masked."""
        keys = (self.comfy_org_api_key, self.bucket_access_key_id, self.bucket_secret_access_key, self.webhook_secret)
        return [*(key.get_secret_value() for key in keys if key is not None), *passwords_of(self.comfyui_url)]


def without_credentials(url: str) -> str:
    """Return a URL without user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def passwords_of(url: str) -> list[str]:
    """Return the password in a URL, both as written and unquoted; an empty list if there is none."""
    password = urlsplit(url).password
    return list(dict.fromkeys((password, unquote(password)))) if password else []


def load_settings(**overrides: Any) -> Settings:
    """Read the environment; `overrides` are fields by their names.

    Raises:
        InvalidInput: a variable has an invalid value; the message names the variable without the value.
    """
    return read_settings(Settings, overrides)


def read_settings(kind: type[AnySettings], overrides: Mapping[str, Any]) -> AnySettings:
    """Read settings of one class from the environment, like `load_settings`."""
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
    """Return the variable for a location in pydantic's error: the name of a field, or already a variable."""
    field = kind.model_fields.get(name)
    return _variables(name, field)[0] if field else name


def _variables(name: str, field: FieldInfo) -> list[str]:
    alias = field.validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [name.upper()]


def _check_bucket(settings: Settings) -> None:
    """Refuse incomplete S3 settings, with which outputs would silently be delivered as base64."""
    needed: Mapping[str, object] = {
        "BUCKET_ENDPOINT_URL": settings.bucket_endpoint_url,
        "BUCKET_ACCESS_KEY_ID": settings.bucket_access_key_id,
        "BUCKET_SECRET_ACCESS_KEY": settings.bucket_secret_access_key,
    }
    missing = [name for name, value in needed.items() if value is None]
    if missing and len(missing) < len(needed):
        raise InvalidInput(f"S3 is only half configured: {' and '.join(missing)} must be set too")


@dataclass(frozen=True)
class Setting:
    """A setting as `--help` and the documentation show it; `variables` has the preferred name first."""

    variables: list[str]
    default: str
    description: str
    is_secret: bool


def list_settings(kind: type[Settings]) -> Iterator[Setting]:
    """Yield the settings that `kind` adds to those of the worker, or all of them for `Settings` itself."""
    shared = {} if kind is Settings else Settings.model_fields
    for name, field in kind.model_fields.items():
        if name not in shared:
            value = field.default.value if isinstance(field.default, Enum) else field.default
            yield Setting(
                variables=_variables(name, field),
                default="" if value is None else str(value),
                description=" ".join((field.description or "").split()),
                is_secret=SecretStr in (field.annotation, *get_args(field.annotation)),
            )
