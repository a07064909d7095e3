"""The gateway's settings, beside the worker's."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from limits import parse
from pydantic import Field, SecretStr, ValidationInfo, ValidatorFunctionWrapHandler, field_validator

from comfy_worker.gateway.api_keys import split_name
from comfy_worker.settings import Settings, complete_url, passwords_of, read_from, read_settings

AboveZero = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]

_POSTGRESQL = ("postgresql", "postgres")
_REDIS = ("redis://", "rediss://", "unix://")


class GatewaySettings(Settings):
    """The settings of `comfy-worker serve` and `comfy-worker worker`."""

    # ------------------------------------------------------------------------------------------- server
    api_host: str = "127.0.0.1"
    """Address to listen on."""
    api_port: Annotated[int, Field(ge=0, le=65535)] = read_from("API_PORT", "PORT", default=8000)
    """Port to listen on; 0 chooses a free one."""
    port_health: Port | None = None
    """Another port, which serves only `/ping`; RunPod's load balancer may require one."""
    api_reload: bool = False
    """Restart whenever the gateway's code changes, for development."""
    api_cache: Literal["memory", "redis"] = "memory"
    """Where events are published and requests counted: in the `memory` of one process, or in `redis` for all."""
    engine: Literal["local", "celery", "runpod"] = "local"
    """Who runs the jobs: `local`, this process; `celery`, a fleet of workers; `runpod`, a RunPod endpoint."""
    max_connections: AboveZero | None = None
    """Largest number of connections of a process; if not set, as many as its limit of open files allows."""
    max_connections_per_address: AboveZero | None = None
    """Largest number of connections from one address that is not a proxy's; if not set, half of all."""
    trusted_proxies: str = read_from("TRUSTED_PROXIES", "FORWARDED_ALLOW_IPS", default="127.0.0.1,::1")
    """Addresses and networks of proxies, separated by commas, whose `X-Forwarded-For` is trusted; `*` for any."""
    public_url: str = ""
    """URL under which clients reach the gateway, for links to outputs; if not set, that of the request."""
    cors_origins: str = ""
    """Origins whose pages may use the API, separated by commas (`https://app.example.com`)."""
    log_format: Literal["text", "json"] = "text"
    """`json` logs one JSON object a line, with the job's id."""

    # --------------------------------------------------------------------------------------------- keys
    api_keys: SecretStr | None = None
    """Keys of clients, separated by commas; `name:key` or `name=key` gives one a name."""
    api_admin_keys: SecretStr | None = None
    """Keys that see and cancel the jobs of all keys, in the same form."""
    api_keys_file: str = ""
    """File with the SHA-256 of one key a line, as `sha256sum` prints it, followed by the key's name; `#` begins a
    comment."""
    rate_limit_run: str = "1000/10 seconds"
    """Largest number of calls of `/run` with one key; `off` for no limit."""
    rate_limit_runsync: str = "2000/10 seconds"
    """The same for `/runsync`."""
    rate_limit_cancel: str = "100/10 seconds"
    """The same for `/cancel`."""
    rate_limit_status: str = "2000/10 seconds"
    """The same for `/status` and all other paths."""
    rate_limit_wrong_keys: str = "20/minute"
    """Largest number of wrong keys from one address before it has to wait, longer each time; `off` for no limit."""
    max_streams_per_key: AboveZero = 500
    """Largest number of open event streams and WebSockets of a key in one process."""

    # --------------------------------------------------------------------------------------------- jobs
    max_queue_size: AboveZero = 100
    """Largest number of waiting jobs."""
    max_queue_size_per_key: AboveZero | None = None
    """Largest number of waiting jobs of a key; if not set, half of all if there are several keys."""
    comfyui_backends: str = ""
    """URLs of several ComfyUIs, separated by commas; if not set, COMFYUI_URL."""
    wait_for_comfyui: bool = False
    """Let jobs wait for a ComfyUI that does not answer for as long as their ttl allows, instead of failing them after
    `COMFYUI_READY_TIMEOUT_S`. Jobs of a fleet or of RunPod always wait."""
    preprocess_workers: Annotated[int, Field(ge=1, le=64)] = 3
    """How many jobs are staged at the same time, beside one of each key."""
    generation_workers: Annotated[int, Field(ge=1, le=16)] = 2
    """How many jobs a ComfyUI is given at the same time: one runs, the others are next."""
    postprocess_workers: Annotated[int, Field(ge=1, le=64)] = 3
    """How many jobs are delivered at the same time, beside one of each key."""
    asset_url_expires_s: Annotated[int, Field(ge=1, le=604_800)] = 3600
    """Seconds for which a link to an output is valid."""
    modifiers_dir: str = "modifiers"
    """Folder with the modifiers that requests can name."""
    modifier_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Seconds that a modifier may take."""
    include_comfyui_response: bool = False
    """Include `comfyui_response`, outputs and status as in ComfyUI's history, in the generate API's results."""

    # ------------------------------------------------------------------------------------------ storage
    data_dir: str = "data"
    """Folder for the database, the outputs and the gateway's own keys."""
    gateway_key: SecretStr | None = None
    """Key with which requests are encrypted in the database; if not set, one is made and kept in DATA_DIR."""
    database_url: Annotated[SecretStr | None, Field(validate_default=True)] = None
    """SQLAlchemy URL of a PostgreSQL; if not set, a SQLite in DATA_DIR."""
    redis_url: SecretStr | None = None
    """URL of the Redis, with its password; if not set, made from the three below."""
    redis_host: str = "localhost"
    """Host of the Redis."""
    redis_port: Port = 6379
    """Port of the Redis."""
    redis_db: Annotated[int, Field(ge=0)] = 0
    """Database of the Redis."""
    api_workers: Annotated[int, Field(ge=1, le=64)] = 1
    """How many processes serve the port; more than 1 need `ENGINE=celery` or `runpod`, `API_CACHE=redis` and a
    PostgreSQL."""

    # ------------------------------------------------------------------------------------------ engines
    worker_lost_s: Annotated[float, Field(ge=1, le=600)] = 10.0
    """Seconds without a sign of life after which a fleet's worker is lost and others take its jobs."""
    visibility_timeout_s: Annotated[int, Field(ge=60, le=2_592_000)] = 86_400
    """Seconds after which Celery sends an unacknowledged job's message again; must exceed the longest job."""
    runpod_endpoint_id: str = ""
    """The RunPod endpoint that runs the jobs, with `ENGINE=runpod`."""
    runpod_api_key: SecretStr | None = None
    """RunPod API key for that endpoint."""
    runpod_endpoint_url: str = "https://api.runpod.ai/v2"
    """Base URL of RunPod's API."""

    @field_validator("api_cache", mode="before")
    @classmethod
    def _in_any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("redis_host", "redis_port", "redis_db", "redis_url", mode="wrap")
    @classmethod
    def _only_with_redis(cls, value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Ignore an invalid value of a setting that is not used."""
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
        """Require what several processes share, unless one of those settings is invalid itself."""
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
            raise ValueError("more than 1 need API_CACHE=redis, which carries the events of all their jobs")
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
        for network in _split(value):
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
        return _split(self.trusted_proxies)

    @property
    def given_keys(self) -> list[str]:
        """The keys of API_KEYS, with their names if they have any."""
        return _keys_in(self.api_keys)

    @property
    def given_admin_keys(self) -> list[str]:
        """The keys of API_ADMIN_KEYS, in the same form."""
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
    """Return whether host, port and database can be parsed; a `/` in a password, say, must be written `%2F`."""
    try:
        parts = urlsplit(redis_url)
        database = "" if parts.scheme == "unix" else parts.path.strip("/")
        return (parts.port is None or parts.port > 0) and (not database or database.isdecimal())
    except ValueError:
        return False


def _keys_in(value: SecretStr | None) -> list[str]:
    return _split(value.get_secret_value() if value else "")


def _split(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _urls_in(value: str) -> list[str]:
    return [complete_url(url.strip()) for url in value.split(",") if url.strip()]


def load_gateway_settings(**overrides: Any) -> GatewaySettings:
    """Read the environment; `overrides` are fields by their names.

    Raises:
        InvalidInput: a variable has an invalid value.
    """
    return read_settings(GatewaySettings, overrides)
