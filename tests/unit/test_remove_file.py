"""A model file is removed below its folder, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.gateway.api.workflow.remove_file import remove_file


def test_a_file_in_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x")
    remove_file(tmp_path, "a/x")
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


def test_the_folder_may_be_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume" / "x").write_text("x")
    (tmp_path / "loras").symlink_to(tmp_path / "volume")
    remove_file(tmp_path / "loras", "x")
    assert not (tmp_path / "volume" / "x").exists()


@pytest.mark.parametrize("name", ["link", "folder", "linked/x", "../x", "folder/../x", ".", ""])
def test_links_folders_and_outside_files_are_rejected(tmp_path: Path, name: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "x"
    (root / "folder").mkdir(parents=True)
    outside.write_text("x")
    (root / "link").symlink_to(outside)
    (root / "linked").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"link|folder"):
        remove_file(root, name)
    assert outside.exists()
    assert (root / "link").is_symlink()


@given(st.text(alphabet="ab./\\", max_size=12))
def test_names_cannot_leave_the_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("case")
    (folder / "root").mkdir()
    (folder / "a").write_text("outside")
    with pytest.raises((ValueError, OSError)):
        remove_file(folder / "root", name)
    assert (folder / "a").read_text() == "outside"
