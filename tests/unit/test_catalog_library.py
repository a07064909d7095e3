"""A folder of named workflows is read when it has changed, and one bad file does not take down the others."""

from __future__ import annotations

import json
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from comfy_worker.catalog.library import Catalog
from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.store.workflow_versions import StoredVersions, VersionedCatalog
from tests.support.comfyui.graphs import picture
from tests.support.paths import ROOT

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
WIDTH = {"type": "integer", "description": "Width.", "default": 64, "sets": [{"node": "1", "input": "width"}]}


class Shelf:
    """A folder, and the library of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.now = 0.0
        monkeypatch.setattr("comfy_worker.catalog.library.monotonic", lambda: self.now)
        self.library = VersionedCatalog(folder, StoredVersions(folder / "kept"))

    def write(self, name: str, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (self.folder / name).write_text(text, encoding="utf-8")

    def later(self) -> VersionedCatalog:
        self.now += 1.0
        return self.library

    def names(self) -> list[str]:
        return [entry.name for entry in self.later().entries()]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    return Shelf(tmp_path, monkeypatch)


def manifest(**parameters: Any) -> dict[str, Any]:
    return {"title": "A title", "description": "", "parameters": parameters}


def refusal(library: Catalog, name: str, version: str | None = None) -> str:
    with pytest.raises(InvalidInput) as refused:
        library.get(name, version)
    return refused.value.message


def test_entries_are_sorted_and_have_their_manifests(shelf: Shelf) -> None:
    shelf.write("red.json", picture(RED))
    shelf.write("blue.json", picture(BLUE))
    shelf.write("blue.manifest.json", manifest(width=WIDTH))
    assert shelf.names() == ["blue", "red"]
    assert list(shelf.library.get("blue").manifest.parameters) == ["width"]
    assert not shelf.library.get("red").manifest.parameters


def test_a_missing_folder_is_an_empty_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(tmp_path / "later", monkeypatch)
    assert shelf.names() == []
    assert refusal(shelf.library, "red") == "There is no template 'red': there are none"
    shelf.folder.mkdir()
    shelf.write("red.json", picture(RED))
    assert shelf.names() == ["red"]


def test_a_file_in_place_of_the_folder_is_a_problem(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("x")
    library = Catalog(tmp_path / "file")
    assert library.entries() == []
    assert caplog.messages == ["the workflow file file is ignored: the folder cannot be read: Not a directory"]


def test_an_unknown_name_suggests_the_nearest_or_all(shelf: Shelf) -> None:
    shelf.write("text-to-image.json", picture(RED))
    shelf.write("upscale.json", picture(BLUE))
    library = shelf.later()
    assert refusal(library, "TextToImage") == "There is no template 'TextToImage': did you mean 'text-to-image'?"
    assert refusal(library, "zzz") == "There is no template 'zzz': the templates are 'text-to-image', 'upscale'"
    assert len(refusal(library, "z" * 100_000)) < 200
    assert refusal(library, "../upscale").startswith("There is no template")


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("bad.json", "{", "it is not JSON: "),
        ("bad.json", '{"1": {"class_type": "A", "inputs": {"x": NaN}}}', "it is not JSON: NaN is not a number of JSON"),
        ("bad.json", "[" * 100_000, "it nests deeper than 200 levels"),
        (
            "bad.json",
            f'{{"1": {{"class_type": "A", "inputs": {{"x": {"[" * 600}{"]" * 600}}}}}}}',
            "it nests deeper than 200 levels",
        ),
        ("bad.json", {"nodes": [], "links": []}, "the workflow is in ComfyUI's UI format"),
        ("bad.json", [], "the workflow is a list"),
        ("Bad Name.json", picture(RED), "its name may have lower-case letters"),
        ("red.manifest.json", "{", "it is not JSON"),
        ("red.manifest.json", "null", "it is not an object"),
        ("red.manifest.json", {"title": "x"}, "description: Field required"),
        ("red.manifest.json", manifest(w={**WIDTH, "sets": [{"node": "7", "input": "x"}]}), "has no input 'x' of node"),
        ("alone.manifest.json", manifest(), "there is no alone.json for it"),
    ],
)
def test_an_invalid_file_is_reported_once_and_does_not_affect_others(
    shelf: Shelf, caplog: pytest.LogCaptureFixture, file: str, content: Any, problem: str
) -> None:
    shelf.write("red.json", picture(RED))
    shelf.write("blue.json", picture(BLUE))
    shelf.write(file, content)
    with caplog.at_level(logging.WARNING):
        names = [shelf.names() for _ in range(3)]
        shelf.write("green.json", picture(GREEN))
        shelf.names()
    assert names == [["blue"] if file.startswith("red") else ["blue", "red"]] * 3
    [message] = caplog.messages
    assert message.startswith(f"the workflow file {file} is ignored: ")
    sentence = message.removeprefix(f"the workflow file {file} is ignored: ")
    assert problem in sentence
    name = file.partition(".")[0]
    assert refusal(shelf.library, name) == f"The template {name!r} cannot be used: {sentence}"


def test_a_repaired_file_is_used_again(shelf: Shelf) -> None:
    shelf.write("red.json", "{")
    assert shelf.names() == []
    shelf.write("red.json", picture(RED))
    assert shelf.names() == ["red"]


def test_broken_symlinks_are_problems_and_hidden_files_are_not(shelf: Shelf) -> None:
    (shelf.folder / "gone.json").symlink_to(shelf.folder / "nowhere")
    shelf.write(".hidden.json", "{")
    shelf.write("notes.txt", "{")
    assert shelf.names() == []
    sentence = "The template 'gone' cannot be used: it cannot be read: No such file or directory"
    assert refusal(shelf.library, "gone") == sentence


def test_changes_are_checked_at_most_once_a_second(shelf: Shelf) -> None:
    shelf.write("red.json", picture(RED))
    assert shelf.names() == ["red"]
    shelf.write("blue.json", picture(BLUE))
    shelf.now += 0.9
    assert [entry.name for entry in shelf.library.entries()] == ["red"]
    shelf.now += 0.1
    assert [entry.name for entry in shelf.library.entries()] == ["blue", "red"]
    (shelf.folder / "red.json").unlink()
    assert shelf.names() == ["blue"]


def test_a_replaced_file_of_equal_size_and_time_is_noticed(shelf: Shelf) -> None:
    shelf.write("red.json", "X")
    before = (shelf.folder / "red.json").stat()
    shelf.write("red.json", picture((1, 2, 3)))
    os.utime(shelf.folder / "red.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    first = shelf.later().get("red")
    shelf.write("new", picture((1, 2, 4)))
    os.utime(shelf.folder / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (shelf.folder / "new").replace(shelf.folder / "red.json")
    assert shelf.later().get("red").version != first.version


def test_versions_are_kept_by_their_content(shelf: Shelf) -> None:
    shelf.write("red.json", picture(RED))
    first = shelf.later().get("red")
    shelf.write("red.manifest.json", manifest(width=WIDTH))
    second = shelf.later().get("red")
    assert shelf.library.get("red", first.version) is first
    (shelf.folder / "red.manifest.json").unlink()
    assert [entry.version for entry in shelf.later().versions("red")] == [second.version, first.version]
    (shelf.folder / "red.json").unlink()
    assert shelf.names() == []
    assert shelf.library.get("red", second.version) == second
    assert refusal(shelf.library, "red", "0" * 12) == (
        f"The template 'red' has no version '000000000000'; the latest is {first.version!r}"
    )
    assert "There is no template 'blue'" in refusal(shelf.library, "blue", first.version)
    assert shelf.library.versions("blue") == []


def test_a_worker_knows_only_the_present_version(shelf: Shelf) -> None:
    shelf.write("red.json", picture(RED))
    catalog = Catalog(shelf.folder)
    version = catalog.get("red").version
    assert catalog.get("red", version) is catalog.get("red")
    assert (
        refusal(catalog, "red", "0" * 12)
        == f"The template 'red' has no version '000000000000'; the latest is {version!r}"
    )


def test_repeated_rewrites_do_not_fill_the_memory(shelf: Shelf) -> None:
    versions = []
    for blue in range(120):
        shelf.write("red.json", picture((0, 0, blue)))
        versions.append(shelf.later().get("red").version)
    assert "has no version" in refusal(shelf.library, "red", versions[19])
    assert shelf.library.get("red", versions[20]).version == versions[20]


def test_threads_share_a_library_while_files_change(shelf: Shelf) -> None:
    shelf.write("red.json", picture(RED))
    ended = threading.Event()

    def read() -> int:
        count = 0
        while not ended.is_set():
            assert shelf.later().get("red").name == "red"
            count += len(shelf.library.entries())
        return count

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        for blue in range(50):
            shelf.write("new", picture((0, 0, blue)))
            (shelf.folder / "new").replace(shelf.folder / "red.json")
        ended.set()
        assert all(reader.result() for reader in readers)
    assert shelf.later().get("red").graph == picture((0, 0, 49))


def test_the_projects_own_folder_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Catalog("workflows").get("solid-color").name == "solid-color"
    (tmp_path / "workflows").mkdir()
    assert Catalog("workflows").entries() == []
    monkeypatch.chdir(ROOT)
    assert Catalog("workflows").get("solid-color").name == "solid-color"
