"""The environment becomes typed settings, or one sentence that names what is wrong with it."""

from __future__ import annotations

import pytest

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.store.progress_writer import INTERVAL_S
from comfy_worker.settings import Settings, load_settings

SECRET = "s3cr3t-value"
BUCKET = {
    "BUCKET_ENDPOINT_URL": "https://shop.s3.eu-central-1.amazonaws.com",
    "BUCKET_ACCESS_KEY_ID": "AKIA-EXAMPLE",
    "BUCKET_SECRET_ACCESS_KEY": SECRET,
}


def load(environment: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        environment.setenv(name, value)
    return load_settings()


def refusal(environment: pytest.MonkeyPatch, **variables: str) -> str:
    with pytest.raises(InvalidInput) as refused:
        load(environment, **variables)
    return refused.value.message


def test_an_empty_environment_works_for_a_local_run(environment: pytest.MonkeyPatch) -> None:
    settings = load(environment)
    assert (settings.comfyui_url, settings.comfyui_address) == ("http://127.0.0.1:8188", "127.0.0.1:8188")
    assert (settings.websocket_reconnect_attempts, settings.websocket_reconnect_delay_s) == (5, 3.0)
    assert settings.log_level == "INFO"
    assert not settings.has_bucket
    assert settings.secrets() == []


@pytest.mark.parametrize("name", ["COMFYUI_URL", "COMFYUI_API_BASE", "COMFY_HOST"])
def test_comfyui_by_the_names_of_other_workers(environment: pytest.MonkeyPatch, name: str) -> None:
    assert load(environment, **{name: "comfy:9000"}).comfyui_url == "http://comfy:9000"


@pytest.mark.parametrize(
    ("value", "url", "address"),
    [
        ("127.0.0.1:8188", "http://127.0.0.1:8188", "127.0.0.1:8188"),
        ("http://comfy", "http://comfy", "comfy"),
        ("https://comfy/base/", "https://comfy/base", "comfy"),
        (f"http://me:{SECRET}@comfy:1", f"http://me:{SECRET}@comfy:1", "comfy:1"),
        ("http://[::1]:8188", "http://[::1]:8188", "[::1]:8188"),
    ],
)
def test_where_comfyui_listens(environment: pytest.MonkeyPatch, value: str, url: str, address: str) -> None:
    settings = load(environment, COMFYUI_URL=value)
    assert (settings.comfyui_url, settings.comfyui_address) == (url, address)


def test_an_empty_variable_counts_as_unset(environment: pytest.MonkeyPatch) -> None:
    settings = load(environment, WORKFLOW_TIMEOUT="", BUCKET_ENDPOINT_URL="", COMFYUI_URL="")
    assert settings == Settings()


def test_the_level_of_the_log_in_any_case(environment: pytest.MonkeyPatch) -> None:
    assert load(environment, LOG_LEVEL="debug").log_level == "DEBUG"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COMFYUI_URL", f"ftp://{SECRET}"),
        ("COMFYUI_URL", f"http://[{SECRET}"),
        ("WORKFLOW_TIMEOUT", SECRET),
        ("WORKFLOW_TIMEOUT", "0"),
        ("WORKFLOW_TIMEOUT", "-1"),
        ("WORKFLOW_TIMEOUT", "nan"),
        ("WEBSOCKET_RECONNECT_ATTEMPTS", "1.5"),
        ("WEBSOCKET_RECONNECT_ATTEMPTS", "-1"),
        ("INPUT_MAX_FILES", "0"),
        ("WEBHOOK_ATTEMPTS", "21"),
        ("BUCKET_URL_EXPIRES_S", "604801"),
        ("LOG_LEVEL", SECRET),
    ],
)
def test_an_invalid_value_is_reported_without_the_value(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    message = refusal(environment, **{name: value})
    assert message.startswith(f"Invalid settings: {name}: ")
    assert SECRET not in message


def test_all_errors_are_in_one_sentence(environment: pytest.MonkeyPatch) -> None:
    message = refusal(environment, WORKFLOW_TIMEOUT="soon", INPUT_MAX_FILES="many")
    assert "WORKFLOW_TIMEOUT: " in message
    assert "; INPUT_MAX_FILES: " in message


def test_a_bucket(environment: pytest.MonkeyPatch) -> None:
    settings = load(environment, **BUCKET, COMFY_ORG_API_KEY="comfyui-key")
    assert settings.has_bucket
    assert sorted(settings.secrets()) == ["AKIA-EXAMPLE", "comfyui-key", SECRET]
    assert not [secret for secret in settings.secrets() if secret in repr(settings) + str(settings)]


@pytest.mark.parametrize("missing", list(BUCKET))
def test_an_incomplete_bucket_is_rejected(environment: pytest.MonkeyPatch, missing: str) -> None:
    half = {name: value for name, value in BUCKET.items() if name != missing}
    assert refusal(environment, **half) == f"S3 is only half configured: {missing} must be set too"


def test_settings_do_not_change(environment: pytest.MonkeyPatch) -> None:
    settings = load(environment)
    with pytest.raises(ValueError, match="frozen"):
        settings.log_level = "DEBUG"


@pytest.mark.parametrize("name", ["COMFY_ORG_API_KEY", "COMFYUI_URL", "WORKFLOW_TIMEOUT", "BUCKET_NAME"])
@pytest.mark.parametrize("value", ["…", "key-…"])
def test_example_placeholders_are_rejected(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    message = refusal(environment, **{name: value})
    assert message == f"Invalid settings: {name}: is the placeholder of an example: put a value of your own there"


def test_progress_in_the_database_is_at_most_a_second_old() -> None:
    assert 0 < INTERVAL_S <= 1
