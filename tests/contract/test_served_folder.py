"""Outputs in a folder that somebody serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from comfy_worker.errors import Cancelled, DeliveryFailed, InvalidInput
from comfy_worker.stop import Stop
from comfy_worker.storage import DeliverableFile, Watched
from comfy_worker.types import Delivered, Delivery
from tests.support.storage.deliveries import LARGE, GeneratedContent, Make, deliverable


def local(folder: Path, **more: Any) -> dict[str, Any]:
    return {"local_delivery_dir": str(folder), "local_delivery_url": "https://files.example.com/out/", **more}


def test_a_local_file_is_stored_under_its_job(storages: Make, tmp_path: Path) -> None:
    ours = storages(**local(tmp_path / "served"))
    delivered = ours.choose(Delivery(type="local")).deliver(deliverable("größe/my picture.png", job_id="a/../b"))
    assert delivered == Delivered("url", "https://files.example.com/out/a-..-b/gr%C3%B6%C3%9Fe/my%20picture.png")
    chosen = ours.choose(Delivery(type="local", prefix="shop/7")).deliver(deliverable("a.png"))
    assert chosen.data == "https://files.example.com/out/shop/7/a.png"
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert written == ["served/a-..-b/größe/my picture.png", "served/shop/7/a.png"]


def test_symlinks_cannot_move_a_local_file_out_of_its_folder(storages: Make, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "served/job-1").symlink_to(tmp_path / "elsewhere")
    storage = storages(**local(tmp_path / "served")).choose(Delivery(type="local"))
    with pytest.raises(DeliveryFailed, match=r"a\.png could not be written: a link in its folder leads elsewhere"):
        storage.deliver(deliverable("a.png"))
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_an_unwritable_folder_is_an_error_without_its_path(storages: Make, tmp_path: Path) -> None:
    (tmp_path / "served").write_text("a file")
    storage = storages(**local(tmp_path / "served")).choose(Delivery(type="local"))
    with pytest.raises(DeliveryFailed) as failure:
        storage.deliver(deliverable("a.png"))
    assert failure.value.message == "a.png could not be written: Not a directory"


def test_a_partial_local_file_is_never_visible(storages: Make, tmp_path: Path) -> None:
    stop = Stop()
    content = Watched(GeneratedContent(len(LARGE), before_last=stop.set), stop.check)
    with pytest.raises(Cancelled):
        storage = storages(**local(tmp_path)).choose(Delivery(type="local"))
        storage.deliver(DeliverableFile("job-1", "large.bin", "application/octet-stream", content))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_local_without_its_settings_is_refused(storages: Make) -> None:
    with pytest.raises(InvalidInput) as refused:
        storages().choose(Delivery(type="local"))
    assert refused.value.message == "input.delivery.type is 'local', but this worker has no folder that is served"
    assert refused.value.hint == "Set LOCAL_DELIVERY_DIR and LOCAL_DELIVERY_URL"
