"""A password in a ComfyUI's URL: it is masked, and nothing that is kept has it."""

from __future__ import annotations

import pytest

from comfy_worker.gateway.api.task.backend_address import backend_at
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.settings import load_settings, passwords_of, without_credentials


@pytest.mark.parametrize(
    ("url", "shown", "passwords"),
    [
        ("http://host:8188", "http://host:8188", []),
        ("http://user@host:8188", "http://host:8188", []),
        ("https://user:p%40ssword@[::1]:8188/sub", "https://[::1]:8188/sub", ["p%40ssword", "p@ssword"]),
    ],
)
def test_a_url_without_its_password(url: str, shown: str, passwords: list[str]) -> None:
    assert without_credentials(url) == shown
    assert passwords_of(url) == passwords


def test_passwords_of_all_comfyuis_are_masked() -> None:
    assert "first-pw" in load_settings(comfyui_url="http://a:first-pw@one:8188").secrets()
    backends = "http://one:8188,http://b:second-pw@two:8188"
    assert "second-pw" in load_gateway_settings(comfyui_backends=backends).secrets()


def test_a_task_names_a_comfyui_without_its_password() -> None:
    assert backend_at("two:8188", ["http://one:8188", "http://b:second-pw@two:8188"]) == "http://two:8188"
