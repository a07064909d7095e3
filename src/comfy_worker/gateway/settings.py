"""The gateway's own settings, beside those that it shares with the worker."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any, Literal
from urllib.parse import urlsplit

from limits import parse
from pydantic import AliasChoices, Field, SecretStr, ValidationInfo, ValidatorFunctionWrapHandler, field_validator

from comfy_worker.gateway.api_keys import split_name
from comfy_worker.settings import Settings, complete_url, passwords_of, read_settings

_POSTGRESQL = ("postgresql", "postgres")
_REDIS = ("redis://", "rediss://", "unix://")


def _named(*names: str, default: Any, description: str, **limits: Any) -> Any:
    return Field(default=default, validation_alias=AliasChoices(*names), description=description, **limits)


class GatewaySettings(Settings):
    """All settings of `python -m comfy_worker serve`."""

    api_host: str = _named("API_HOST", default="127.0.0.1", description="Address to listen on.")
    api_port: int = _named(
        "API_PORT", "PORT", default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one."
    )
    port_health: int | None = _named(
        "PORT_HEALTH",
        default=None,
        ge=1,
        le=65535,
        description="A further port that answers `/ping` alone, as RunPod's load balancer may ask for.",
    )
    api_reload: bool = _named(
        "API_RELOAD", default=False, description="Start again whenever the gateway's own code changes, to work on it."
    )
    api_cache: Literal["memory", "redis"] = _named(
        "API_CACHE",
        default="memory",
        description="What carries the news of jobs and counts calls: `memory`, of one process; `redis`, of all.",
    )
    engine: Literal["local", "celery", "runpod"] = _named(
        "ENGINE",
        default="local",
        description="Who runs the jobs: `local`, this process; `celery`, a fleet of workers; `runpod`, an endpoint.",
    )
    redis_url: SecretStr | None = _named(
        "REDIS_URL",
        default=None,
        description="URL of the Redis, with its password; made of the three below if not set.",
    )
    progress_note_s: float = _named(
        "PROGRESS_NOTE_S",
        default=0.5,
        ge=0,
        le=60,
        description="Seconds between two notes in the database of how far running jobs are; 0 for none.",
    )
    wait_for_comfyui: bool = _named(
        "WAIT_FOR_COMFYUI",
        default=False,
        description="Let jobs wait for a ComfyUI that does not answer for as long as their ttl allows, instead of "
        "failing them after `COMFYUI_READY_TIMEOUT_S`. Jobs of a fleet or of RunPod always wait.",
    )
    worker_lost_s: float = _named(
        "WORKER_LOST_S",
        default=10.0,
        ge=1,
        le=600,
        description="A worker of a fleet that says nothing for so many seconds is lost: others take its jobs.",
    )
    visibility_timeout_s: int = _named(
        "VISIBILITY_TIMEOUT_S",
        default=86_400,
        ge=60,
        le=2_592_000,
        description="After how many seconds Celery sends a job's message again that no worker acknowledged; to be "
        "longer than the longest job.",
    )
    runpod_endpoint_id: str = _named(
        "RUNPOD_ENDPOINT_ID", default="", description="The endpoint that runs the jobs; read with `ENGINE=runpod` only."
    )
    runpod_api_key: SecretStr | None = _named(
        "RUNPOD_API_KEY", default=None, description="A key of RunPod that may use it; read with `ENGINE=runpod` only."
    )
    runpod_endpoint_url: str = _named(
        "RUNPOD_ENDPOINT_URL",
        default="https://api.runpod.ai/v2",
        description="Base URL of RunPod's API; read with `ENGINE=runpod` only.",
    )
    redis_host: str = _named(
        "REDIS_HOST", default="localhost", description="Host of the Redis; read if something needs one."
    )
    redis_port: int = _named("REDIS_PORT", default=6379, ge=1, le=65535, description="Its port, likewise.")
    redis_db: int = _named("REDIS_DB", default=0, ge=0, description="Its database, likewise.")
    api_keys: SecretStr | None = _named(
        "API_KEYS",
        default=None,
        description="Keys that clients may use, separated by commas; `name:key` or `name=key` gives one a name.",
    )
    api_admin_keys: SecretStr | None = _named(
        "API_ADMIN_KEYS", default=None, description="Keys that see and cancel the jobs of all keys, likewise."
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
        "DATABASE_URL",
        default=None,
        validate_default=True,
        description="SQLAlchemy URL of a PostgreSQL; SQLite in DATA_DIR if not set.",
    )
    api_workers: int = _named(
        "API_WORKERS",
        default=1,
        ge=1,
        le=64,
        description="How many processes serve the port; more than 1 need `ENGINE=celery` or `runpod`, "
        "`API_CACHE=redis` and a PostgreSQL.",
    )
    comfyui_backends: str = _named(
        "COMFYUI_BACKENDS",
        default="",
        description="URLs of several ComfyUIs, separated by commas; COMFYUI_URL if empty.",
    )
    preprocess_workers: int = _named(
        "PREPROCESS_WORKERS",
        default=3,
        ge=1,
        le=64,
        description="How many jobs are staged at the same time; one of each key always may.",
    )
    generation_workers: int = _named(
        "GENERATION_WORKERS",
        default=2,
        ge=1,
        le=16,
        description="How many jobs a ComfyUI has at the same time: one runs, the others are next.",
    )
    postprocess_workers: int = _named(
        "POSTPROCESS_WORKERS",
        default=3,
        ge=1,
        le=64,
        description="How many jobs are delivered at the same time; one of each key always may.",
    )
    max_queue_size: int = _named("MAX_QUEUE_SIZE", default=100, ge=1, description="How many jobs may wait.")
    max_queue_size_per_key: int | None = _named(
        "MAX_QUEUE_SIZE_PER_KEY",
        default=None,
        ge=1,
        description="How many of them may be one key's; half of all if not set and there are several keys.",
    )

    api_keys_file: str = _named(
        "API_KEYS_FILE",
        default="",
        description="File with the SHA-256 of one key a line, as `sha256sum` prints it, with the key's name behind it; "
        "`#` begins a comment.",
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
    max_connections: int | None = _named(
        "MAX_CONNECTIONS",
        default=None,
        ge=1,
        description="How many connections a process may have; if not set, as many as its limit of open files allows.",
    )
    max_connections_per_address: int | None = _named(
        "MAX_CONNECTIONS_PER_ADDRESS",
        default=None,
        ge=1,
        description="How many of them may come from one address, other than a proxy's; half of all if not set.",
    )
    trusted_proxies: str = _named(
        "TRUSTED_PROXIES",
        "FORWARDED_ALLOW_IPS",
        default="127.0.0.1,::1",
        description="Addresses and networks of proxies, separated by commas: their `X-Forwarded-For` is believed; `*` "
        "for any.",
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
    rate_limit_wrong_keys: str = _named(
        "RATE_LIMIT_WRONG_KEYS",
        default="20/minute",
        description="Most wrong keys from one address before it has to wait, for longer each time; `off` for no limit.",
    )
    max_streams_per_key: int = _named(
        "MAX_STREAMS_PER_KEY",
        default=500,
        ge=1,
        description="How many event streams and WebSockets a process lets a key have open.",
    )
    modifiers_dir: str = _named(
        "MODIFIERS_DIR", default="modifiers", description="Folder of the modifiers that requests may name."
    )
    modifier_timeout_s: float = _named(
        "MODIFIER_TIMEOUT_S", default=30.0, gt=0, le=3600, description="Seconds that a modifier may take."
    )
    include_comfyui_response: bool = _named(
        "INCLUDE_COMFYUI_RESPONSE",
        default=False,
        description="`/generate` and its kin tell the outputs and the status in the words of ComfyUI's history too.",
    )
    log_format: Literal["text", "json"] = _named(
        "LOG_FORMAT", default="text", description="`json` writes one JSON object a line, with the job's id."
    )

    @field_validator("api_cache", mode="before")
    @classmethod
    def _in_any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("redis_host", "redis_port", "redis_db", "redis_url", mode="wrap")
    @classmethod
    def _only_with_redis(cls, value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Leave out what nobody reads, however wrong it is."""
        if info.data.get("api_cache") == "memory" and info.data.get("engine") != "celery":
            return cls.model_fields[str(info.field_name)].default
        return check(value)

    @field_validator("redis_url")
    @classmethod
    def _of_redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None or not value.get_secret_value():
            return None
        if not value.get_secret_value().startswith(_REDIS):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        if not _is_readable(value.get_secret_value()):
            raise ValueError("cannot be read: it must be like redis://:password@host:6379/0")
        return value

    @field_validator("database_url")
    @classmethod
    def _of_a_database(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        kind = urlsplit(value.get_secret_value()).scheme.partition("+")[0] if value else "sqlite"
        if kind not in ("sqlite", *_POSTGRESQL):
            raise ValueError("must begin with postgresql:// or sqlite:///")
        if info.data.get("engine") == "celery" and kind not in _POSTGRESQL:
            raise ValueError(
                "a fleet (ENGINE=celery) needs a PostgreSQL in DATABASE_URL: its gateways and workers share it, and "
                "SQLite is one machine's own"
            )
        return value or None

    @field_validator("api_workers")
    @classmethod
    def _shared_by_all(cls, value: int, info: ValidationInfo) -> int:
        """Refuse several processes without what they have to share; a setting that is wrong itself is told alone."""
        if value == 1 or not {"engine", "api_cache", "database_url"} <= info.data.keys():
            return value
        if info.data.get("api_reload"):
            raise ValueError("must be 1 with API_RELOAD, which is for one process")
        if info.data["engine"] == "local":
            raise ValueError(
                "must be 1 with ENGINE=local: one gateway has a database to itself, and serves several ComfyUIs if "
                "COMFYUI_BACKENDS names them"
            )
        if info.data["api_cache"] != "redis":
            raise ValueError("more than 1 need API_CACHE=redis: they hear of each other's jobs through it")
        database = info.data["database_url"]
        if database is None or not database.get_secret_value().startswith(_POSTGRESQL):
            raise ValueError("more than 1 need a PostgreSQL in DATABASE_URL: SQLite is for one process")
        return value

    @field_validator(
        "rate_limit_run", "rate_limit_runsync", "rate_limit_cancel", "rate_limit_status", "rate_limit_wrong_keys"
    )
    @classmethod
    def _readable(cls, value: str) -> str:
        if value.lower() == "off":
            return ""
        parse(value)
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _of_networks(cls, value: str) -> str:
        for network in _listed(value):
            if network != "*":
                ip_network(network, strict=False)
        return value

    @field_validator("public_url", "runpod_endpoint_url")
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
    def proxies(self) -> list[str]:
        """The addresses and networks of TRUSTED_PROXIES."""
        return _listed(self.trusted_proxies)

    @property
    def given_keys(self) -> list[str]:
        """The keys of API_KEYS, with their names where they have one."""
        return _keys_in(self.api_keys)

    @property
    def given_admin_keys(self) -> list[str]:
        """The keys of API_ADMIN_KEYS, likewise."""
        return _keys_in(self.api_admin_keys)

    @property
    def backends(self) -> list[str]:
        """The URLs of all ComfyUIs."""
        return _urls_in(self.comfyui_backends) or [self.comfyui_url]

    @property
    def broker_url(self) -> SecretStr:
        """The URL of the Redis."""
        return self.redis_url or SecretStr(f"redis://{self.redis_host}:{self.redis_port}/{self.redis_db}")

    def secrets(self) -> list[str]:
        """Return every secret value, for masking."""
        given = (self.database_url, self.gateway_key, self.redis_url, self.runpod_api_key)
        own = [value.get_secret_value() for value in given if value is not None]
        of_backends = [password for url in self.backends for password in passwords_of(url)]
        of_redis = passwords_of(self.broker_url.get_secret_value())
        keys = [split_name(key)[1] for key in (*self.given_keys, *self.given_admin_keys)]
        return [*super().secrets(), *keys, *own, *of_backends, *of_redis]


def _is_readable(redis_url: str) -> bool:
    """Return whether host, port and database can be told apart; a `/` in a password, say, has to be written `%2F`."""
    try:
        parts = urlsplit(redis_url)
        database = "" if parts.scheme == "unix" else parts.path.strip("/")
        return (parts.port is None or parts.port > 0) and (not database or database.isdecimal())
    except ValueError:
        return False


def _keys_in(value: SecretStr | None) -> list[str]:
    return _listed(value.get_secret_value() if value else "")


def _listed(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _urls_in(value: str) -> list[str]:
    return [complete_url(url.strip()) for url in value.split(",") if url.strip()]


def load_gateway_settings(**overrides: Any) -> GatewaySettings:
    """Read the environment; `overrides` are fields by their names.

    Raises:
        InvalidInput: a variable has a value that it cannot have.
    """
    return read_settings(GatewaySettings, overrides)
