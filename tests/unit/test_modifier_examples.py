"""The two modifiers in `modifiers/`: what they take, what they need, what they leave alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from comfy_worker.gateway.modifiers import Modifiers, run_modifier
from comfy_worker.graph.workflow import check_workflow
from comfy_worker.modifiers import MissingValue
from tests.support.modifiers import workflow_made_by

ROOT = Path(__file__).parents[2]
PHOTO = "https://example.com/photo.png"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Modifiers:
    monkeypatch.chdir(tmp_path)
    return Modifiers(ROOT / "modifiers")


def inputs_of(made: dict[str, Any], class_type: str) -> list[dict[str, Any]]:
    return [node["inputs"] for node in check_workflow(made).values() if node["class_type"] == class_type]


def test_our_modifiers(own: Modifiers) -> None:
    assert own.names() == ["Image2Image", "ImageToImage", "Text2Image", "TextToImage"]


def test_text_to_image_takes_its_values(own: Modifiers) -> None:
    numbers = {"steps": 7, "cfg": 3.5, "sampler_name": "heun", "scheduler": "karras", "denoise": 0.9, "seed": 5}
    size = {"width": 640, "height": 384, "batch_size": 2}
    words = {"prompt": "a lighthouse", "negative_prompt": "rain", "ckpt_name": "other.safetensors"}
    made = workflow_made_by(own, "TextToImage", {**numbers, **size, **words})
    (sampler,) = inputs_of(made, "KSampler")
    assert {name: sampler[name] for name in numbers} == numbers
    assert inputs_of(made, "EmptyLatentImage") == [size]
    assert inputs_of(made, "CheckpointLoaderSimple") == [{"ckpt_name": "other.safetensors"}]
    assert made[sampler["positive"][0]]["inputs"]["text"] == "a lighthouse"
    assert made[sampler["negative"][0]]["inputs"]["text"] == "rain"


def test_image_to_image_takes_its_values(own: Modifiers) -> None:
    numbers = {"steps": 7, "cfg": 3.5, "sampler_name": "heun", "scheduler": "karras", "denoise": 0.25, "seed": 5}
    size = {"width": 640, "height": 384}
    words = {"prompt": "a lighthouse", "negative_prompt": "rain", "ckpt_name": "other.safetensors"}
    made = workflow_made_by(own, "ImageToImage", {**numbers, **size, **words, "input_image": PHOTO})
    (sampler,), (scaled,) = inputs_of(made, "KSampler"), inputs_of(made, "ImageScale")
    assert {name: sampler[name] for name in numbers} == numbers
    assert {name: scaled[name] for name in size} == size
    assert inputs_of(made, "LoadImage") == [{"image": PHOTO}]
    assert inputs_of(made, "CheckpointLoaderSimple") == [{"ckpt_name": "other.safetensors"}]
    assert made[sampler["positive"][0]]["inputs"]["text"] == "a lighthouse"
    assert made[sampler["negative"][0]]["inputs"]["text"] == "rain"


def test_the_documented_name_and_values_work(own: Modifiers) -> None:
    made = workflow_made_by(own, "Image2Image", {"prompt": "a beautiful sunset", "steps": 30, "input_image": PHOTO})
    assert inputs_of(made, "LoadImage") == [{"image": PHOTO}]
    assert inputs_of(made, "KSampler")[0]["steps"] == 30


REQUIRED: dict[str, dict[str, Any]] = {
    "TextToImage": {"prompt": "a lighthouse"},
    "ImageToImage": {"prompt": "a lighthouse", "input_image": "there.png"},
}


@pytest.mark.parametrize("name", REQUIRED)
def test_our_modifiers_keep_omitted_values(own: Modifiers, name: str) -> None:
    made = workflow_made_by(own, name, REQUIRED[name])
    before = json.loads((ROOT / own.find(name).modifier.WORKFLOW_JSON).read_text())
    changed = {
        (made[node_id]["class_type"], key)
        for node_id, node in before.items()
        for key in node["inputs"].keys() | made[node_id]["inputs"].keys()
        if node["inputs"].get(key) != made[node_id]["inputs"].get(key)
    }
    pictures = {("LoadImage", "image")} if name == "ImageToImage" else set()
    assert changed == {("CLIPTextEncode", "text"), ("KSampler", "seed"), *pictures}
    assert isinstance(inputs_of(made, "KSampler")[0]["seed"], int)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REQUIRED.items() for value in values])
def test_our_modifiers_name_missing_values(own: Modifiers, name: str, value: str) -> None:
    given = {key: other for key, other in REQUIRED[name].items() if key != value}
    with pytest.raises(MissingValue, match=f"Modifier {name} needs the value '{value}'"):
        workflow_made_by(own, name, given)


AI_DOCKS = {
    "prompt": "A beautiful sunset over mountains, photorealistic",
    "negative_prompt": "blurry, low quality",
    "ckpt_name": "v1-5-pruned-emaonly-fp16.safetensors",
    "seed": "__RANDOM_INT__",
    "steps": 20,
    "cfg_scale": 8.5,
    "width": 512,
    "height": 512,
    "sampler_name": "dpmpp_2m",
}
"""What the example of AI-Dock's wrapper sends to its Text2Image."""


def test_ai_docks_text2image_takes_all_of_its_examples_values(own: Modifiers) -> None:
    made = run_modifier(own, "Text2Image", AI_DOCKS)
    (sampler,) = inputs_of(made.workflow, "KSampler")
    assert (sampler["cfg"], sampler["steps"], sampler["sampler_name"]) == (8.5, 20, "dpmpp_2m")
    assert type(sampler["seed"]) is int
    assert made.unread == ()


@pytest.mark.parametrize("name", ["Text2Image", "Image2Image"])
def test_ai_docks_modifiers_take_denoise_and_need_no_prompt(own: Modifiers, name: str) -> None:
    made = run_modifier(own, name, {"denoise": 0.5, "scheduler": "karras", "input_image": PHOTO})
    (sampler,) = inputs_of(made.workflow, "KSampler")
    assert (sampler["denoise"], sampler["scheduler"]) == (0.5, "karras")
    assert made.workflow[sampler["positive"][0]]["inputs"]["text"] == ""


def test_an_unread_value_is_named(own: Modifiers) -> None:
    assert run_modifier(own, "Text2Image", {"prompt": "x", "colour": "red", "cfg": 2}).unread == ("colour",)
