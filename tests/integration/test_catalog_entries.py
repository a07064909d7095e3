"""Every ready-made workflow is one that a real ComfyUI knows, and runs.

Checked against what `/object_info` of two versions says, on the emulator, and, where COMFYUI_URL names a real ComfyUI,
by its own check, to which only the models may be missing.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import pytest
import requests
from PIL import Image

from comfy_emulator.model_files import DEFAULT_MODELS, FOLDER_OF_INPUT
from comfy_worker.catalog.entry import CatalogEntry, fill
from comfy_worker.catalog.library import Catalog
from comfy_worker.catalog.parameter import Parameter
from comfy_worker.graph.workflow import is_link
from comfy_worker.settings import load_settings
from comfy_worker.worker import Worker
from tests.support.comfyui.graphs import SIDE, data_uri, png
from tests.support.comfyui.instance import ComfyUI, emulator
from tests.support.paths import ROOT
from tests.support.waiting import TIMEOUT_S

LIBRARY = Catalog(ROOT / "workflows")
ENTRIES = LIBRARY.entries()
WANTED = {
    "text-to-image-sd15",
    "text-to-image-sdxl",
    "text-to-image-flux",
    "text-to-image-sd3",
    "image-to-image",
    "inpaint",
    "upscale",
    "text-to-video-hunyuan",
    "solid-color",
    "resize-picture",
}
WITHOUT_MODELS = {"solid-color", "resize-picture"}
OBJECT_INFO = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "tests" / "data" / "object_info").glob("*.json"))
}
PICTURE = data_uri(png((200, 30, 60)))
SMALL = {"width": 64, "height": 64, "duration": 0.1, "steps": 2}

each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
each_version = pytest.mark.parametrize("version", OBJECT_INFO)


def needed(parameter: Parameter) -> Any:
    """Return a value that a required parameter may have."""
    values: Mapping[str, Any] = {"string": "a hill at dusk", "integer": 64, "file": PICTURE}
    return values[parameter.type]


def inputs_of(entry: CatalogEntry, **others: Any) -> dict[str, Any]:
    required = {name: needed(one) for name, one in entry.manifest.parameters.items() if one.is_required}
    return {**required, **{name: value for name, value in others.items() if name in entry.manifest.parameters}}


def filled(entry: CatalogEntry) -> dict[str, dict[str, Any]]:
    return fill(entry, inputs_of(entry), Random(1)).workflow


def test_the_folder_has_the_expected_entries() -> None:
    assert {entry.name for entry in ENTRIES} >= WANTED
    files = (ROOT / "workflows").glob("*.json")
    assert {entry.name for entry in ENTRIES} == {file.name.partition(".")[0] for file in files}
    assert set(OBJECT_INFO) == {"v0.3.64", "v0.8.0"}


# --------------------------------------------------------------------------------------- what ComfyUI knows


@each_version
@each_entry
def test_classes_inputs_and_links_are_valid(entry: CatalogEntry, version: str) -> None:
    problems = list(misfits(filled(entry), OBJECT_INFO[version]))
    assert problems == []


def misfits(workflow: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a workflow by what `/object_info` says."""
    if not any(known[node["class_type"]]["output_node"] for node in workflow.values()):
        yield "no node is an output"
    for node_id, node in workflow.items():
        info = known[node["class_type"]]
        required, optional = info["input"].get("required", {}), info["input"].get("optional", {})
        yield from (f"{node_id}: {name} is missing" for name in required.keys() - node["inputs"].keys())
        yield from (
            f"{node_id}: {name} is unknown" for name in node["inputs"].keys() - required.keys() - optional.keys()
        )
        for name, value in node["inputs"].items():
            spec = {**required, **optional}.get(name)
            problem = spec and misfit(value, spec, (node["class_type"], name), workflow, known)
            if problem:
                yield f"{node_id}.{name}: {problem}"


def misfit(
    value: Any, spec: list[Any], place: tuple[str, str], workflow: Mapping[str, Any], known: Mapping[str, Any]
) -> str | None:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if is_link(value):
        given = known[workflow[value[0]]["class_type"]]["output"][value[1]]
        return None if given == kind else f"a {given} is linked where a {kind} belongs"
    if isinstance(kind, list) or kind == "COMBO":
        values = kind if isinstance(kind, list) else options["options"]
        is_file = place in FOLDER_OF_INPUT or options.get("image_upload")
        return None if is_file or value in values else f"{value!r} is not in {values}"
    types: dict[str, Any] = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    if not isinstance(value, types[kind]) or (kind != "BOOLEAN" and isinstance(value, bool)):
        return f"{value!r} is no {kind}"
    if kind in ("INT", "FLOAT") and not options["min"] <= value <= options["max"]:
        return f"{value!r} is not within {options['min']} and {options['max']}"
    return None


@each_version
@each_entry
def test_the_limits_of_parameters_are_within_those_of_the_nodes(entry: CatalogEntry, version: str) -> None:
    for name, parameter in entry.manifest.parameters.items():
        for value in limits(parameter):
            workflow = fill(entry, inputs_of(entry, **{name: value}), Random(1)).workflow
            assert list(misfits(workflow, OBJECT_INFO[version])) == [], (name, value)


def limits(parameter: Parameter) -> list[Any]:
    return [value for value in (parameter.minimum, parameter.maximum, *(parameter.choices or ())) if value is not None]


@each_entry
def test_defaults_match_the_graph(entry: CatalogEntry) -> None:
    for name, parameter in entry.manifest.parameters.items():
        if parameter.default is not None and not parameter.is_random:
            for target in parameter.sets:
                set_there = entry.graph[target.node]["inputs"][target.input]
                assert set_there == parameter.mapped(parameter.default), name


@each_entry
def test_the_models_match_the_graph(entry: CatalogEntry) -> None:
    loads = {
        (folder, value)
        for node in filled(entry).values()
        for name, value in node["inputs"].items()
        if (folder := FOLDER_OF_INPUT.get((node["class_type"], name)))
    }
    assert {(model.folder, model.file) for model in entry.manifest.models} == loads
    assert all(model.url and model.url.endswith(f"/{model.file}") for model in entry.manifest.models)
    assert (loads == set()) == (entry.name in WITHOUT_MODELS)
    assert all(file in DEFAULT_MODELS[folder] for folder, file in loads), "the emulator has them"


@each_entry
def test_everything_has_a_description(entry: CatalogEntry) -> None:
    texts = [entry.manifest.description, *(one.description for one in entry.manifest.parameters.values())]
    assert all(text.endswith(".") for text in texts)
    assert all(node["_meta"]["title"] for node in entry.graph.values())


# ------------------------------------------------------------------------------------------- on the emulator


@pytest.fixture(scope="module")
def comfyui() -> Iterator[ComfyUI]:
    with emulator() as running:
        yield running


@pytest.fixture(scope="module")
def worker(comfyui: ComfyUI) -> Iterator[Worker]:
    running = Worker(load_settings(comfyui_url=comfyui.url, workflows_dir=str(ROOT / "workflows")))
    yield running
    running.close()


def run(worker: Worker, entry: CatalogEntry, **inputs: Any) -> list[dict[str, Any]]:
    job_input = {"template": entry.name, "inputs": inputs_of(entry, **inputs)}
    output = worker.run({"id": f"job-of-{entry.name}", "input": job_input})
    assert "error" not in output, output
    assert "errors" not in output, output
    images: list[dict[str, Any]] = output["images"]
    return images


@each_entry
def test_it_runs(worker: Worker, entry: CatalogEntry) -> None:
    [made] = run(worker, entry, **SMALL)
    assert made["mime_type"] == ("video/mp4" if "video" in entry.name else "image/png")
    assert made["filename"].startswith(entry.name)


def test_a_video_has_the_requested_length(worker: Worker) -> None:
    entry = LIBRARY.get("text-to-video-hunyuan")
    [made] = run(worker, entry, **{**SMALL, "duration": 1, "style": "cinematic"})
    assert made["duration_s"] == pytest.approx(25 / 24, abs=0.01)
    assert (made["width"], made["height"]) == (64, 64)


def test_images_have_the_requested_size_and_color(worker: Worker) -> None:
    color = 0x10A0F0
    [made] = run(worker, LIBRARY.get("solid-color"), width=33, height=20, color=color)
    assert colors_of(made) == ((33, 20), [(0x10, 0xA0, 0xF0)])


def test_a_picture_is_resized(worker: Worker) -> None:
    entry = LIBRARY.get("resize-picture")
    [made] = run(worker, entry, width=16)
    assert colors_of(made) == ((16, 16), [(200, 30, 60)]), "a height of 0 keeps the shape"
    [made] = run(worker, entry, width=16, height=40, crop="cut", method="area")
    assert (made["width"], made["height"]) == (16, 40)


def test_unmasked_pixels_are_unchanged(worker: Worker) -> None:
    [made] = run(worker, LIBRARY.get("inpaint"), mask=data_uri(png((0, 0, 0))), steps=2)
    assert colors_of(made) == ((SIDE, SIDE), [(200, 30, 60)])
    [made] = run(worker, LIBRARY.get("inpaint"), mask=data_uri(png((255, 255, 255))), steps=2)
    assert colors_of(made)[1] != [(200, 30, 60)]


def colors_of(made: Mapping[str, Any]) -> tuple[tuple[int, int], list[Any]]:
    with Image.open(io.BytesIO(base64.b64decode(made["data"]))) as image:
        found = image.convert("RGB").getcolors(2**16)
        return image.size, [color for _count, color in found or ()]


# ------------------------------------------------------------------------------------- on a real ComfyUI


@pytest.mark.real
@pytest.mark.skipif("COMFYUI_URL" not in os.environ, reason="COMFYUI_URL names no real ComfyUI")
@each_entry
def test_a_real_comfyui_lacks_only_models(entry: CatalogEntry) -> None:
    url = os.environ["COMFYUI_URL"].rstrip("/")
    result = fill(entry, inputs_of(entry), Random(1))
    for image in result.images:
        file = {"image": (image["name"], png((200, 30, 60)), "image/png")}
        requests.post(f"{url}/upload/image", files=file, timeout=TIMEOUT_S).raise_for_status()
    answer = requests.post(f"{url}/prompt", json={"prompt": result.workflow}, timeout=TIMEOUT_S).json()
    classes = {node_id: node["class_type"] for node_id, node in result.workflow.items()}
    missing = set()
    for node_id, problem in (answer.get("node_errors") or {}).items():
        for error in problem["errors"]:
            assert error["type"] == "value_not_in_list", error
            input_name = error["extra_info"]["input_name"]
            missing.add((FOLDER_OF_INPUT[classes[node_id], input_name], error["extra_info"]["received_value"]))
    assert missing <= {(model.folder, model.file) for model in entry.manifest.models}
    assert missing or "prompt_id" in answer, answer
