"""Model management: which files ComfyUI has, how large they are, and that an administrator can delete one."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from comfy_emulator import EmulatorServer
from tests.support.comfyui.graphs import node, picture, work
from tests.support.gateway.process import GatewayProcess, gateway_process
from tests.support.waiting import TIMEOUT_S

ADMIN = {"Authorization": "Bearer an-administrators-key"}
CLAIMED = "v1-5-pruned-emaonly.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comfyui")


@pytest.fixture(scope="module")
def gateway(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with EmulatorServer(base_directory=base) as comfyui:
        settings = {"API_ADMIN_KEYS": "an-administrators-key", "COMFYUI_BASE_DIRECTORY": str(base)}
        with gateway_process(comfyui.url, tmp_path_factory.mktemp("data"), **settings) as running:
            yield running


def put(base: Path, name: str, content: bytes = b"weights") -> Path:
    file = base / "models" / "loras" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def delete(gateway: GatewayProcess, path: str, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
    answer = requests.delete(f"{gateway.url}/api/models/{path}", headers=headers, timeout=TIMEOUT_S)
    return answer.status_code, answer.json()


def test_a_folder_lists_files_with_sizes_and_times(gateway: GatewayProcess, base: Path) -> None:
    file = put(base, "styles/ink.safetensors", b"x" * 1234)
    answer = gateway.get("/api/models/loras").json()
    shown = next(model for model in answer["models"] if model["name"] == "styles/ink.safetensors")
    assert (shown["folder"], shown["size_bytes"]) == ("loras", 1234)
    assert abs(datetime.fromisoformat(shown["modified_at"]).timestamp() - file.stat().st_mtime) < 1
    assert answer["folder"] == "loras"
    assert answer["size_bytes"] == sum(model["size_bytes"] for model in answer["models"]) >= 1234
    assert gateway.get("/api/models/loras/styles/ink.safetensors").json() == shown
    assert shown in gateway.get("/api/models?details=true").json()["loras"]
    assert "styles/ink.safetensors" in gateway.get("/api/models").json()["loras"]


def test_missing_folders_and_files_are_404(gateway: GatewayProcess) -> None:
    for path in ("nothing", "nothing/x.safetensors", "loras/x.safetensors", "loras/..%2F..%2Finput"):
        answer = gateway.get(f"/api/models/{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), path


def test_comfyuis_own_example_finds_its_model(gateway: GatewayProcess) -> None:
    assert CLAIMED in gateway.get("/api/models").json()["checkpoints"]


def test_an_administrator_deletes_a_file(gateway: GatewayProcess, base: Path) -> None:
    file, other = put(base, "old/a.safetensors"), put(base, "old/b.safetensors")
    status, answer = delete(gateway, "loras/old/a.safetensors", ADMIN)
    assert (status, answer["message"]) == (200, "Model deleted")
    assert (answer["model"]["name"], answer["model"]["size_bytes"]) == ("old/a.safetensors", 7)
    assert (file.exists(), other.exists()) == (False, True)
    assert gateway.get("/api/models/loras/old/a.safetensors").status_code == 404


def test_nobody_else_can_delete_a_file(gateway: GatewayProcess, base: Path) -> None:
    file = put(base, "kept.safetensors")
    status, answer = delete(gateway, "loras/kept.safetensors", gateway.headers)
    assert (status, answer["code"]) == (403, "forbidden")
    assert "API_ADMIN_KEYS" in answer["detail"]
    assert delete(gateway, "loras/kept.safetensors", {})[0] == 401
    assert file.exists()


def test_nothing_is_deleted_without_keys(base: Path, tmp_path: Path) -> None:
    file = put(base, "kept.safetensors")
    settings = {"API_KEYS": "", "COMFYUI_BASE_DIRECTORY": str(base)}
    with EmulatorServer(base_directory=base) as comfyui, gateway_process(comfyui.url, tmp_path, **settings) as gateway:
        assert delete(gateway, "loras/kept.safetensors", {})[0] == 403
    assert file.exists()


@pytest.mark.parametrize("path", ["loras/../../input/x", "loras/%2e%2e/%2e%2e/input/x", "loras//etc/passwd", "../x"])
def test_names_cannot_leave_their_folder(gateway: GatewayProcess, base: Path, path: str) -> None:
    (base / "input").mkdir(exist_ok=True)
    kept = base / "input" / "x"
    kept.write_bytes(b"x")
    request = requests.Request("DELETE", gateway.url, headers=ADMIN).prepare()
    request.url = f"{gateway.url}/api/models/{path}"  # as it is written here
    with requests.Session() as session:
        assert session.send(request, timeout=TIMEOUT_S).status_code in (404, 405)
    assert kept.exists()


def test_symlinks_are_left_alone(gateway: GatewayProcess, base: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.safetensors"
    target.write_bytes(b"weights")
    folder = base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "link.safetensors").symlink_to(target)
    status, answer = delete(gateway, "loras/link.safetensors", ADMIN)
    assert (status, answer["code"]) == (409, "not_possible")
    assert (folder / "link.safetensors").is_symlink()
    assert target.exists()


def test_files_on_other_disks_are_not_deleted(gateway: GatewayProcess) -> None:
    status, answer = delete(gateway, f"checkpoints/{CLAIMED}", ADMIN)
    assert (status, answer["error"]) == (409, f"{CLAIMED} is not on a disk that the gateway can reach")


def test_nothing_is_deleted_without_comfyuis_disk(base: Path, tmp_path: Path) -> None:
    file = put(base, "kept.safetensors")
    settings = {"API_ADMIN_KEYS": "an-administrators-key"}
    with EmulatorServer(base_directory=base) as comfyui, gateway_process(comfyui.url, tmp_path, **settings) as gateway:
        status, answer = delete(gateway, "loras/kept.safetensors", ADMIN)
    assert (status, answer["code"], file.exists()) == (409, "not_possible", True)
    assert "COMFYUI_BASE_DIRECTORY" in answer["hint"]


def test_files_in_use_are_kept_until_the_job_ends(gateway: GatewayProcess, base: Path) -> None:
    file = put(base, "used.safetensors")
    job_id = gateway.run({**work(600.0), "77": node("PreviewAny", source="used.safetensors")})
    status, answer = delete(gateway, "loras/used.safetensors", ADMIN)
    assert (status, answer["error"]) == (409, "used.safetensors is used by 1 job that has not ended")
    gateway.post(f"/cancel/{job_id}")
    assert delete(gateway, "loras/used.safetensors", ADMIN)[0] == 200
    assert not file.exists()


def test_downloads_are_not_implemented(gateway: GatewayProcess) -> None:
    answer = gateway.post("/api/models", {"url": "https://example.com/x.safetensors"})
    assert (answer.status_code, answer.json()["error"]) == (501, "Downloading a model is not there yet")
    assert gateway.ended(gateway.run(picture((1, 2, 3))))["status"] == "COMPLETED"
