"""The worker gives the same answers on the emulator as on a real ComfyUI, for every recorded workflow.

`tests/data/same_answers.json` holds what the worker answered on a real ComfyUI 0.8.0 without models. It was written by

    python -m tests.integration.test_same_answers http://127.0.0.1:8188 > tests/data/same_answers.json
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from comfy_emulator import EmulatorServer
from comfy_worker.job.payload import split_failure
from comfy_worker.settings import load_settings
from comfy_worker.worker import Worker

DATA = Path(__file__).parents[1] / "data"
TEST_INPUT = Path(__file__).parents[2] / "test_input.json"


def recorded_workflows() -> dict[str, Any]:
    """Return every distinct workflow that was submitted in the recordings, and that of test_input.json."""
    workflows: dict[str, Any] = {"test_input": None}
    seen = set()
    for file in sorted((DATA / "comfyui_traffic" / "v0.8.0").glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            record = json.loads(line)
            if record["kind"] != "http" or record["method"] != "POST" or record["path"] != "/prompt":
                continue
            workflow = record["request"].get("json", {}).get("prompt")
            if workflow is not None and (text := json.dumps(workflow)) not in seen:
                seen.add(text)
                workflows[f"{file.stem}:{number}"] = workflow
    return workflows


WORKFLOWS = recorded_workflows()
EXPECTED = DATA / "same_answers.json"


def picture() -> bytes:
    """Return a small picture with some of everything, alpha included."""
    image = Image.new("RGBA", (16, 16), (200, 30, 60, 255))
    image.putpixel((3, 3), (0, 255, 0, 0))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def tone() -> bytes:
    """Return a tenth of a second of sound."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(b"".join(struct.pack("<h", (step * 997) % 20000 - 10000) for step in range(800)))
    return file.getvalue()


FILES = {
    "jobs/abc/in.png": picture(),
    "corrupt.png": b"\x89PNG\r\n\x1a\n broken",
    "tone.wav": tone(),
}


def job(name: str) -> dict[str, Any]:
    """Return the job that runs a recorded workflow, with the files that it loads and time that costs nobody sleep."""
    if name == "test_input":
        own: dict[str, Any] = json.loads(TEST_INPUT.read_text(encoding="utf-8"))
        return own
    workflow = json.loads(json.dumps(WORKFLOWS[name]))
    for node in workflow.values():
        if isinstance(node, dict) and "seconds" in node.get("inputs", {}):
            node["inputs"]["seconds"] = min(0.2, node["inputs"]["seconds"])
    text = json.dumps(workflow)
    images = [
        {"name": file, "image": base64.b64encode(content).decode()} for file, content in FILES.items() if file in text
    ]
    return {"id": name, "input": {"workflow": workflow, "images": images, "include_previews": True}}


def answer(worker: Worker, name: str) -> dict[str, Any]:
    """Return what must be the same everywhere: files, kinds, counts, sizes, texts, errors."""
    output = worker.run(job(name))
    if output.get("partial"):
        # ComfyUI runs output nodes in no certain order: what one had made before another failed is chance.
        output = split_failure(output)[1]
    summary: dict[str, Any] = {
        kind: sorted(_described(item) for item in output[kind])
        for kind in ("images", "videos", "audio", "files")
        if kind in output
    }
    for key in ("texts", "status", "errors", "error", "code", "details", "hint"):
        if key in output:
            summary[key] = output[key]
    return _without_near_classes(json.loads(json.dumps(summary)))


def _without_near_classes(summary: dict[str, Any]) -> dict[str, Any]:
    """Leave out which class is most like one that does not exist: a real ComfyUI has more of them."""
    for problem in (summary.get("details") or {}).get("problems", []):
        if "node class" in problem["message"]:
            problem.pop("nearest", None)
            summary["error"] = summary["error"].partition("; did you mean")[0]
    return summary


def _described(item: dict[str, Any]) -> list[Any]:
    # Previews carry five random letters; and ComfyUI runs output nodes in no certain order, so which of two files
    # with the same prefix gets the lower number is chance.
    filename = re.sub(r"_\d{5}_", "_#_", re.sub(r"_temp_[a-z]{5}_", "_temp_", item["filename"]))
    size = [item.get("width"), item.get("height")]
    return [item["node_id"], item["index"], filename, item["subfolder"], item["mime_type"], size, item["preview"]]


@pytest.fixture(scope="module")
def emulated() -> Iterator[Worker]:
    with EmulatorServer(models={}) as server:
        worker = Worker(load_settings(comfyui_url=server.url))
        yield worker
        worker.close()


@pytest.fixture(scope="module")
def real() -> Iterator[Worker]:
    worker = Worker(load_settings(comfyui_url=os.environ["COMFYUI_URL"]))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    answers: dict[str, Any] = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return answers


def test_every_recorded_workflow_has_an_expected_answer(expected: dict[str, Any]) -> None:
    assert list(expected) == list(WORKFLOWS)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_emulator_answers_like_comfyui(emulated: Worker, expected: dict[str, Any], name: str) -> None:
    assert answer(emulated, name) == expected[name]


@pytest.mark.real
@pytest.mark.skipif("COMFYUI_URL" not in os.environ, reason="COMFYUI_URL names no real ComfyUI")
@pytest.mark.parametrize("name", WORKFLOWS)
def test_comfyui_answers_as_recorded(real: Worker, expected: dict[str, Any], name: str) -> None:
    assert answer(real, name) == expected[name]


if __name__ == "__main__":
    recorder = Worker(load_settings(comfyui_url=sys.argv[1]))
    print(json.dumps({name: answer(recorder, name) for name in WORKFLOWS}, indent=1, ensure_ascii=False))
