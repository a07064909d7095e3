"""The settings that the generate API's description names: each is read, or refused in one clear sentence."""

from __future__ import annotations

from typing import Any

import pytest

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.settings import GatewaySettings, load_gateway_settings

S3 = {
    "S3_ACCESS_KEY_ID": "key",
    "S3_SECRET_ACCESS_KEY": "secret",
    "S3_BUCKET_NAME": "bucket",
    "S3_ENDPOINT_URL": "https://s3.amazonaws.com",
    "S3_REGION": "us-east-1",
}


def load(environment: pytest.MonkeyPatch, **variables: str) -> GatewaySettings:
    for name, value in variables.items():
        environment.setenv(name, value)
    return load_gateway_settings()


def refusal(environment: pytest.MonkeyPatch, **variables: str) -> str:
    with pytest.raises(InvalidInput) as refused:
        load(environment, **variables)
    return refused.value.message


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("API_HOST", "0.0.0.0", "api_host", "0.0.0.0"),
        ("API_PORT", "9000", "api_port", 9000),
        ("API_WORKERS", "1", "api_workers", 1),
        ("API_RELOAD", "true", "api_reload", True),
        ("API_LOG_LEVEL", "debug", "log_level", "DEBUG"),
        ("COMFYUI_API_BASE", "http://comfyui:8188", "comfyui_url", "http://comfyui:8188"),
        ("PREPROCESS_WORKERS", "5", "preprocess_workers", 5),
        ("GENERATION_WORKERS", "3", "generation_workers", 3),
        ("POSTPROCESS_WORKERS", "4", "postprocess_workers", 4),
        ("MAX_QUEUE_SIZE", "7", "max_queue_size", 7),
        ("API_CACHE", "Memory", "api_cache", "memory"),
        ("WEBHOOK_URL", "https://your-webhook.com", "webhook_url", "https://your-webhook.com"),
        ("WEBHOOK_TIMEOUT", "12", "webhook_timeout_s", 12.0),
    ],
)
def test_a_setting_is_read_by_its_name(
    environment: pytest.MonkeyPatch, name: str, value: str, field: str, expected: Any
) -> None:
    assert getattr(load(environment, **{name: value}), field) == expected


def test_the_documented_defaults(environment: pytest.MonkeyPatch) -> None:
    settings = load(environment)
    assert (settings.api_port, settings.api_workers, settings.api_reload, settings.log_level) == (
        8000,
        1,
        False,
        "INFO",
    )
    assert (settings.preprocess_workers, settings.generation_workers, settings.postprocess_workers) == (3, 2, 3)
    assert (settings.max_queue_size, settings.webhook_timeout_s) == (100, 30)
    assert settings.comfyui_url == "http://127.0.0.1:8188"


def test_a_bucket_by_the_documented_names(environment: pytest.MonkeyPatch) -> None:
    settings = load(environment, **S3)
    assert settings.has_bucket
    assert (settings.bucket_name, settings.bucket_region) == ("bucket", "us-east-1")
    assert settings.bucket_endpoint_url == S3["S3_ENDPOINT_URL"]
    assert {"key", "secret"} <= set(settings.secrets())


@pytest.mark.parametrize("value", ["0", "2", "-1"])
def test_several_processes_are_rejected_with_advice(environment: pytest.MonkeyPatch, value: str) -> None:
    sentence = refusal(environment, API_WORKERS=value)
    assert "API_WORKERS" in sentence
    if value == "2":
        assert "must be 1 with ENGINE=local" in sentence
        assert "COMFYUI_BACKENDS" in sentence


def test_several_processes_are_accepted_with_shared_services(environment: pytest.MonkeyPatch) -> None:
    shared = {"ENGINE": "runpod", "API_CACHE": "redis", "DATABASE_URL": "postgresql://gateway@db/gateway"}
    assert load(environment, API_WORKERS="4", **shared).api_workers == 4


@pytest.mark.parametrize("value", ["redis", "Redis"])
def test_a_redis_cache_uses_its_settings(environment: pytest.MonkeyPatch, value: str) -> None:
    settings = load(environment, API_CACHE=value, REDIS_HOST="cache", REDIS_PORT="6380", REDIS_DB="2")
    assert settings.api_cache == "redis"
    assert settings.broker_url.get_secret_value() == "redis://cache:6380/2"


def test_the_redis_url_takes_precedence_and_is_secret(environment: pytest.MonkeyPatch) -> None:
    settings = load(environment, API_CACHE="redis", REDIS_HOST="cache", REDIS_URL="rediss://:p%40ss@host:6390/1")
    assert settings.broker_url.get_secret_value() == "rediss://:p%40ss@host:6390/1"
    assert {"rediss://:p%40ss@host:6390/1", "p@ss"} <= set(settings.secrets())
    assert "p%40ss" not in repr(settings)
    assert "REDIS_URL" in refusal(environment, API_CACHE="redis", REDIS_URL="http://host")


def test_other_caches_are_rejected(environment: pytest.MonkeyPatch) -> None:
    sentence = refusal(environment, API_CACHE="disk")
    assert "memory" in sentence
    assert "redis" in sentence


def test_redis_settings_are_ignored_without_a_redis_cache(environment: pytest.MonkeyPatch) -> None:
    settings = load(environment, REDIS_HOST="redis", REDIS_PORT="none", REDIS_DB="-1")
    assert (settings.redis_host, settings.redis_port, settings.redis_db) == ("localhost", 6379, 0)


def test_redis_settings_are_checked_with_a_redis_cache(environment: pytest.MonkeyPatch) -> None:
    sentence = refusal(environment, API_CACHE="redis", REDIS_PORT="none", REDIS_DB="-1")
    assert "REDIS_PORT" in sentence
    assert "REDIS_DB" in sentence


@pytest.mark.parametrize("name", ["PREPROCESS_WORKERS", "GENERATION_WORKERS", "POSTPROCESS_WORKERS", "MAX_QUEUE_SIZE"])
def test_a_pool_has_at_least_one_worker(environment: pytest.MonkeyPatch, name: str) -> None:
    assert name in refusal(environment, **{name: "0"})


def test_backends_may_be_given_without_a_scheme() -> None:
    settings = load_gateway_settings(comfyui_backends="10.0.0.1:8188, https://other.example/ ,")
    assert settings.backends == ["http://10.0.0.1:8188", "https://other.example"]


def test_an_invalid_backend_is_rejected(environment: pytest.MonkeyPatch) -> None:
    assert "COMFYUI_BACKENDS" in refusal(environment, COMFYUI_BACKENDS="http://10.0.0.1:8188,ftp://x")
