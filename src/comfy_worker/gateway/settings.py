"""The gateway's own settings, beside those that it shares with the worker."""

from __future__ import annotations

from typing import Any, Literal

from limits import parse
from pydantic import AliasChoices, Field, SecretStr, ValidationInfo, ValidatorFunctionWrapHandler, field_validator

from comfy_worker.settings import Settings, complete_url, passwords_of, read_settings


def _named(*names: str, default: Any, description: str, **limits: Any) -> Any:
    return Field(default=default, validation_alias=AliasChoices(*names), description=description, **limits)


class GatewaySettings(Settings):
    """All settings of `python -m comfy_worker serve`."""

    api_host: str = _named("API_HOST", default="127.0.0.1", description="Address to listen on.")
    api_port: int = _named(
        "API_PORT", "PORT", default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one."
    )
    api_workers: int = _named("API_WORKERS", default=1, description="How many processes serve the port; only 1 works.")
    api_reload: bool = _named(
        "API_RELOAD", default=False, description="Start again whenever the gateway's own code changes, to work on it."
    )
    api_cache: str = _named(
        "API_CACHE",
        default="memory",
        description="What carries the news of jobs: `memory`; `redis` is refused, it is not supported yet.",
    )
    redis_host: str = _named(
        "REDIS_HOST", default="localhost", description="Host of the Redis; read with `API_CACHE=redis` only."
    )
    redis_port: int = _named(
        "REDIS_PORT", default=6379, ge=1, le=65535, description="Its port; read with `API_CACHE=redis` only."
    )
    redis_db: int = _named("REDIS_DB", default=0, ge=0, description="Its database; read with `API_CACHE=redis` only.")
    api_keys: SecretStr | None = _named(
        "API_KEYS", default=None, description="Keys that clients may use, separated by commas."
    )
    data_dir: str = _named(
        "DATA_DIR", default="data", description="Folder for the database, the outputs and the gateway's own key."
    )
    gateway_key: SecretStr | None = _named(
        "GATEWAY_KEY",
        default=None,
        description="What requests are encrypted with in the database; made and kept in DATA_DIR if not set.",
    )
    database_url: SecretStr | None = _named(
        "DATABASE_URL", default=None, description="SQLAlchemy URL of a PostgreSQL; SQLite in DATA_DIR if not set."
    )
    comfyui_backends: str = _named(
        "COMFYUI_BACKENDS",
        default="",
        description="URLs of several ComfyUIs, separated by commas; COMFYUI_URL if empty.",
    )
    preprocess_workers: int = _named(
        "PREPROCESS_WORKERS", default=3, ge=1, le=64, description="How many jobs are staged at the same time."
    )
    generation_workers: int = _named(
        "GENERATION_WORKERS",
        default=2,
        ge=1,
        le=16,
        description="How many jobs a ComfyUI has at the same time: one runs, the others are next.",
    )
    postprocess_workers: int = _named(
        "POSTPROCESS_WORKERS", default=3, ge=1, le=64, description="How many jobs are delivered at the same time."
    )
    max_queue_size: int = _named("MAX_QUEUE_SIZE", default=100, ge=1, description="How many jobs may wait.")

    api_keys_file: str = _named(
        "API_KEYS_FILE",
        default="",
        description="File with the SHA-256 of one key a line, as `sha256sum` prints it; `#` begins a comment.",
    )
    cors_origins: str = _named(
        "CORS_ORIGINS",
        default="",
        description="Origins whose pages may use the API, separated by commas (`https://app.example.com`).",
    )
    public_url: str = _named(
        "PUBLIC_URL",
        default="",
        description="URL under which clients reach the gateway, for links to outputs; taken from the request if empty.",
    )
    asset_url_expires_s: int = _named(
        "ASSET_URL_EXPIRES_S", default=3600, ge=1, le=604_800, description="How long a link to an output works."
    )
    rate_limit_run: str = _named(
        "RATE_LIMIT_RUN",
        default="1000/10 seconds",
        description="Most calls of `/run` with one key; `off` for no limit.",
    )
    rate_limit_runsync: str = _named(
        "RATE_LIMIT_RUNSYNC", default="2000/10 seconds", description="The same for `/runsync`."
    )
    rate_limit_cancel: str = _named(
        "RATE_LIMIT_CANCEL", default="100/10 seconds", description="The same for `/cancel`."
    )
    rate_limit_status: str = _named(
        "RATE_LIMIT_STATUS", default="2000/10 seconds", description="The same for `/status` and each other path."
    )
    modifiers_dir: str = _named(
        "MODIFIERS_DIR", default="modifiers", description="Folder of the modifiers that requests may name."
    )
    modifier_timeout_s: float = _named(
        "MODIFIER_TIMEOUT_S", default=30.0, gt=0, le=3600, description="Seconds that a modifier may take."
    )
    log_format: Literal["text", "json"] = _named(
        "LOG_FORMAT", default="text", description="`json` writes one JSON object a line, with the job's id."
    )

    @field_validator("api_workers")
    @classmethod
    def _one(cls, value: int) -> int:
        if value != 1:
            raise ValueError(
                "must be 1: one gateway has a database to itself, and serves several ComfyUIs if COMFYUI_BACKENDS "
                "names them"
            )
        return value

    @field_validator("api_cache")
    @classmethod
    def _known_cache(cls, value: str) -> str:
        if value.lower() == "redis":
            raise ValueError(
                "redis is not supported yet: jobs and results are kept in the database, and one gateway serves them; "
                "set it to memory"
            )
        if value.lower() != "memory":
            raise ValueError("must be memory")
        return value.lower()

    @field_validator("redis_host", "redis_port", "redis_db", mode="wrap")
    @classmethod
    def _only_with_redis(cls, value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Leave out what nobody reads, however wrong it is."""
        if info.data.get("api_cache") == "memory":
            return cls.model_fields[str(info.field_name)].default
        return check(value)

    @field_validator("rate_limit_run", "rate_limit_runsync", "rate_limit_cancel", "rate_limit_status")
    @classmethod
    def _readable(cls, value: str) -> str:
        if value.lower() == "off":
            return ""
        parse(value)
        return value

    @field_validator("public_url")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return value.rstrip("/")

    @field_validator("comfyui_backends")
    @classmethod
    def _complete_urls(cls, value: str) -> str:
        return ",".join(_urls_in(value))

    @property
    def allowed_origins(self) -> list[str]:
        """The origins whose pages may use the API."""
        return [origin.strip().rstrip("/") for origin in self.cors_origins.split(",") if origin.strip()]

    @property
    def given_keys(self) -> list[str]:
        """The keys of API_KEYS."""
        keys = self.api_keys.get_secret_value().split(",") if self.api_keys else []
        return [key.strip() for key in keys if key.strip()]

    @property
    def backends(self) -> list[str]:
        """The URLs of all ComfyUIs."""
        return _urls_in(self.comfyui_backends) or [self.comfyui_url]

    def secrets(self) -> list[str]:
        """Return every secret value, for masking."""
        own = [value.get_secret_value() for value in (self.database_url, self.gateway_key) if value is not None]
        of_backends = [password for url in self.backends for password in passwords_of(url)]
        return [*super().secrets(), *self.given_keys, *own, *of_backends]


def _urls_in(value: str) -> list[str]:
    return [complete_url(url.strip()) for url in value.split(",") if url.strip()]


def load_gateway_settings(**overrides: Any) -> GatewaySettings:
    """Read the environment; `overrides` are fields by their names.

    Raises:
        InvalidInput: a variable has a value that it cannot have.
    """
    return read_settings(GatewaySettings, overrides)
