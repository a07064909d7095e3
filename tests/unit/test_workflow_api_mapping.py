"""The workflow API's translations: graphs that a request changes, and a job's record in the API's words."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.catalog.entry import make_entry
from comfy_worker.catalog.library import Catalog
from comfy_worker.errors import InvalidInput, MissingModels, WorkerError
from comfy_worker.gateway.api.workflow.batch import inputs_of_runs
from comfy_worker.gateway.api.workflow.graph_edits import with_inputs, with_prompt, with_seed
from comfy_worker.gateway.api.workflow.requests import cache_key_of, input_of, job_of
from comfy_worker.gateway.api.workflow.status import status_body
from comfy_worker.gateway.api.workflow.video import inputs_of, missing_models
from comfy_worker.gateway.errors import RequestTooLarge
from comfy_worker.gateway.jobs.queue_position import QueuePosition
from comfy_worker.gateway.settings import load_gateway_settings
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.gateway.store.workflow_versions import MAX_VERSIONS, StoredVersions, VersionedCatalog
from comfy_worker.types import JobState
from tests.support.comfyui.graphs import Graph, node, picture
from tests.support.paths import ROOT

LIBRARY = Catalog(ROOT / "workflows")
NOW = 1_000.0


def sampled(**more: dict[str, Any]) -> Graph:
    """Return a graph with a sampler that has a positive and a negative text."""
    return {
        "4": node("CheckpointLoaderSimple", ckpt_name="a.safetensors"),
        "6": node("CLIPTextEncode", text="old", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="bad hands", clip=["4", 1]),
        "3": node("KSampler", seed=1, positive=["6", 0], negative=["7", 0], model=["4", 0]),
        **more,
    }


# ------------------------------------------------------------------------------------------------ prompt


def test_a_prompt_replaces_the_positive_text() -> None:
    graph = sampled()
    before = copy.deepcopy(graph)
    changed = with_prompt(graph, "a cat")
    assert changed["6"]["inputs"]["text"] == "a cat"
    assert changed["7"]["inputs"]["text"] == "bad hands"
    assert graph == before


def test_a_prompt_is_traced_through_intermediate_nodes() -> None:
    graph = sampled(
        c=node("ControlNetApplyAdvanced", positive=["k", 0], negative=["7", 0], control_net=["n", 0]),
        k=node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["8", 0]),
    )
    graph["8"] = node("CLIPTextEncodeSDXL", text_g="g", text_l="l", width=1024)
    graph["3"]["inputs"]["positive"] = ["c", 0]
    changed = with_prompt(graph, "a cat")
    assert changed["6"]["inputs"]["text"] == "a cat"
    assert changed["8"]["inputs"] == {"text_g": "a cat", "text_l": "a cat", "width": 1024}
    assert changed["7"] == graph["7"]


def test_a_prompt_is_traced_through_a_guider() -> None:
    graph = {
        "1": node("CLIPTextEncodeFlux", clip_l="x", t5xxl=["9", 0], guidance=3.5),
        "2": node("CLIPTextEncode", text="other"),
        "3": node("FluxGuidance", conditioning=["1", 0]),
        "5": node("BasicGuider", model=["4", 0], conditioning=["3", 0]),
        "6": node("SamplerCustomAdvanced", guider=["5", 0]),
    }
    changed = with_prompt(graph, "a cat")
    assert changed["1"]["inputs"] == {"clip_l": "a cat", "t5xxl": "a cat", "guidance": 3.5}
    assert changed["2"] == graph["2"]


def test_a_single_text_is_the_prompt_without_a_sampler() -> None:
    graph = {"1": node("CLIPTextEncode", text="old"), "2": node("KSampler", model=["1", 0], seed=12345)}
    assert with_prompt(graph, "new")["1"]["inputs"]["text"] == "new"


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (picture((1, 2, 3)), "no text encoders"),
        ({"1": node("CLIPTextEncode", text="a"), "2": node("CLIPTextEncode", text="b")}, "2 text encoders"),
    ],
)
def test_a_prompt_without_a_target_is_rejected(graph: Graph, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        with_prompt(graph, "a cat")


@given(
    st.dictionaries(
        st.sampled_from("abcdef"),
        st.builds(
            lambda kind, inputs: {"class_type": kind, "inputs": inputs},
            st.sampled_from(["KSampler", "CLIPTextEncode", "BasicGuider", "ConditioningCombine"]),
            st.dictionaries(
                st.sampled_from(["positive", "conditioning", "conditioning_2", "text"]),
                st.one_of(st.text(max_size=3), st.sampled_from("abcdef").map(lambda name: [name, 0])),
            ),
        ),
    )
)
def test_any_graph_gets_its_prompt_or_an_error(graph: Graph) -> None:
    before = copy.deepcopy(graph)
    try:
        changed = with_prompt(graph, "a cat")
    except InvalidInput:
        pass
    else:
        assert any(found["inputs"].get("text") == "a cat" for found in changed.values())
    assert graph == before


# ------------------------------------------------------------------------------------------ seeds and sets


def test_a_seed_is_set_in_every_node() -> None:
    graph = sampled(n=node("RandomNoise", noise_seed=5), s=node("KSampler", seed=["n", 0]))
    changed = with_seed(graph, 42)
    assert changed["3"]["inputs"]["seed"] == 42
    assert changed["n"]["inputs"]["noise_seed"] == 42
    assert changed["s"]["inputs"]["seed"] == ["n", 0]
    with pytest.raises(InvalidInput, match="seed"):
        with_seed(picture((1, 2, 3)), 42)


def test_inputs_are_set_by_node_and_name() -> None:
    graph = {**picture((1, 2, 3)), "12:3.4": node("EmptyImage", width=1)}
    changed = with_inputs(graph, {"1.color": 7, "12:3.4.width": 64})
    assert changed["1"]["inputs"]["color"] == 7
    assert changed["12:3.4"]["inputs"]["width"] == 64
    assert graph["1"]["inputs"]["color"] != 7


def test_all_unknown_inputs_are_named() -> None:
    with pytest.raises(InvalidInput) as caught:
        with_inputs(picture((1, 2, 3)), {"1.colour": 7, "5.text": "x", "text": "x"})
    assert "node '1' has no input 'colour', did you mean 'color'?" in caught.value.message
    assert "'5.text' names no node" in caught.value.message
    assert "'text' names no node" in caught.value.message


# ---------------------------------------------------------------------------------------------- requests


def test_a_graph_is_bare_or_in_comfyuis_envelope() -> None:
    graph = picture((1, 2, 3))
    assert input_of({"workflow": graph}, LIBRARY) == {"workflow": graph}
    wrapped = {"workflow": {"prompt": graph, "extra_data": {"a": 1, "b": 1}}, "extra_data": {"b": 2}}
    assert input_of(wrapped, LIBRARY) == {"workflow": graph, "extra_data": {"a": 1, "b": 2}}


def test_a_template_takes_the_prompt_as_its_parameter() -> None:
    made = input_of({"template": "text-to-image-sd15", "prompt": "a cat"}, LIBRARY, {"seed": 1})
    assert "a cat" in json.dumps(made["workflow"])
    version = LIBRARY.get("text-to-image-sd15").version
    body = {"template": "text-to-image-sd15", "version": version, "prompt": ""}
    assert input_of(body, LIBRARY, {"seed": 1, "prompt": "a cat"}) == made


@pytest.mark.parametrize(
    ("body", "inputs", "words"),
    [
        ({}, None, "Send a workflow"),
        ({"workflow": picture((1, 2, 3)), "template": "solid-color"}, None, "send one of them"),
        ({"workflow": picture((1, 2, 3))}, {"a": 1}, "go with a template"),
        ({"workflow": picture((1, 2, 3)), "version": "a"}, None, "version goes with a template"),
        ({"template": "solid-color@a", "version": "a"}, None, "said twice"),
        ({"template": "solid-color", "version": "a"}, None, "has no version"),
        ({"template": "solid-color"}, {"colour": "x"}, "colour"),
        ({"template": "text-to-image-sd15", "prompt": "a"}, {"prompt": "b"}, "are the same"),
        ({"workflow": []}, None, "list"),
        ({"workflow": {"nodes": []}}, None, "UI format"),
        ({"workflow": {"1": {"inputs": {}}}}, None, "class_type is missing"),
    ],
)
def test_conflicting_fields_are_rejected(body: Any, inputs: Any, words: str) -> None:
    with pytest.raises(WorkerError, match=words) as caught:
        input_of(body, LIBRARY, inputs)
    assert caught.value.http_status == 400


def test_the_cache_key_is_made_of_the_request_and_the_template() -> None:
    body = {"workflow": {"a": 1, "b": 2}, "cache": True, "prompt": None}
    key = cache_key_of(body, LIBRARY)
    assert cache_key_of({"cache": True, "workflow": {"b": 2, "a": 1}}, LIBRARY) == key
    assert cache_key_of({**body, "prompt": "a"}, LIBRARY) != key


def test_a_changed_template_has_another_cache_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100, 10))
    monkeypatch.setattr("comfy_worker.catalog.library.monotonic", lambda: float(next(clock)))
    library = Catalog(tmp_path)
    keys = set()
    for color in (1, 2):
        (tmp_path / "mine.json").write_text(json.dumps(picture((0, 0, color))), encoding="utf-8")
        keys.add(cache_key_of({"template": "mine"}, library))
    assert len(keys) == 2


def test_workflow_timeout_is_the_jobs_if_it_is_set() -> None:
    assert "policy" not in job_of({}, load_gateway_settings())
    settings = load_gateway_settings(workflow_timeout_s=90.0)
    assert job_of({}, settings)["policy"] == {"executionTimeout": 90_000}


# ------------------------------------------------------------------------------------------------- batch


def runs(**body: Any) -> list[Graph]:
    return [dict(run["workflow"]) for run in inputs_of_runs(body, LIBRARY)]


def test_a_batch_is_one_graph_many_times() -> None:
    assert [run["3"]["inputs"]["seed"] for run in runs(workflow=sampled(), seeds=[7, 8])] == [7, 8]
    graph = picture((1, 2, 3))
    for name in ("sets", "inputs"):
        assert [run["1"]["inputs"]["color"] for run in runs(workflow=graph, **{name: [{"1.color": 5}, {}]})] == [
            5,
            graph["1"]["inputs"]["color"],
        ]


def test_a_template_batch_is_filled_in_per_run() -> None:
    made = runs(template="text-to-image-sd15", inputs=[{"prompt": "a cat"}, {"prompt": "a dog"}])
    assert ["a cat" in json.dumps(made[0]), "a dog" in json.dumps(made[1])] == [True, True]
    same = runs(template="text-to-image-sd15", inputs={"prompt": "a cat"}, seeds=[1, 2])
    assert json.dumps(same[0]) != json.dumps(same[1])
    assert all("a cat" in json.dumps(run) for run in same)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "one list"),
        ({"seeds": [1], "sets": [{}]}, "one list"),
        ({"seeds": []}, "1 to 100"),
        ({"seeds": [1] * 101}, "has 101"),
        ({"inputs": {"a": 1}, "seeds": [1]}, "go with a template"),
        ({"sets": [{}, {"5.text": ""}]}, "sets.1: '5.text' names no node"),
    ],
)
def test_an_invalid_batch_is_rejected(body: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        runs(workflow=sampled(), **body)


def test_an_oversized_batch_is_rejected() -> None:
    with pytest.raises(RequestTooLarge):
        runs(workflow=sampled(), seeds=[1] * 100, images=[{"name": "a.png", "image": "A" * 700_000}])


# ------------------------------------------------------------------------------------------------- video


def test_a_video_uses_the_templates_parameters() -> None:
    body = {
        "prompt": "A beautiful sunset over mountains",
        "duration": 5,
        "resolution": "512x512",
        "style": "cinematic",
        "extra_params": {"steps": 30},
    }
    inputs = inputs_of(body)
    beside = {"prompt": body["prompt"], "duration": 5, "style": "cinematic", "steps": 30}
    assert inputs == {**beside, "width": 512, "height": 512}
    graph = input_of({"template": "text-to-video-hunyuan"}, LIBRARY, inputs)["workflow"]
    [size] = [found["inputs"] for found in graph.values() if found["class_type"] == "EmptyHunyuanLatentVideo"]
    assert (size["width"], size["height"], size["length"]) == (512, 512, 121)


def test_extra_params_must_not_repeat_fields() -> None:
    with pytest.raises(InvalidInput, match=r"extra_params says again .*: width"):
        inputs_of({"prompt": "a", "resolution": "64x64", "extra_params": {"width": 64}})
    assert inputs_of({"prompt": "a", "extra_params": {"width": 64}}) == {"prompt": "a", "width": 64}


def test_missing_models_are_named_with_their_folders() -> None:
    error = missing_models("mine", [{"folder": "vae", "file": "v.safetensors", "url": "https://example.com/v"}])
    assert isinstance(error, MissingModels)
    assert "v.safetensors (put it into models/vae)" in error.as_output()["error"]
    assert error.as_output()["details"]["models"][0]["url"] == "https://example.com/v"


# ------------------------------------------------------------------------------------------------ status


def record(state: JobState, **fields: Any) -> JobRecord:
    return JobRecord(id="p", endpoint_id="local", state=state, created_at=1.0, **fields)


EMPTY = {
    "prompt_id": "p",
    "status": "pending",
    "progress": 0.0,
    "current_node": None,
    "current_node_title": None,
    "output_images": [],
    "output_videos": [],
    "error": None,
    "estimated_time_remaining": None,
}


def test_a_waiting_workflow_has_an_estimate() -> None:
    waiting = record(JobState.IN_QUEUE)
    assert status_body(waiting, None, None, None) == EMPTY
    shown = status_body(waiting, None, QueuePosition(2, 10.2, 5.0), None)
    assert shown == {**EMPTY, "queue_position": 2, "estimated_time_remaining": 16}
    assert status_body(waiting, None, QueuePosition(1, None, 5.0), None)["estimated_time_remaining"] is None
    away = QueuePosition(1, None, notice="ComfyUI has not answered since then")
    shown = status_body(waiting, away.as_progress(), away, None)
    assert shown == {**EMPTY, "queue_position": 1, "notice": away.notice}


def test_a_running_workflow_has_its_progress() -> None:
    last = {"percent": 50.0, "node": {"id": "3", "title": "KSampler"}}
    shown = status_body(record(JobState.IN_PROGRESS), last, QueuePosition(0, 0.0, 6.2), None)
    assert shown == {
        **EMPTY,
        "status": "running",
        "progress": 50.0,
        "current_node": "3",
        "current_node_title": "KSampler",
        "estimated_time_remaining": 7,
    }
    assert status_body(record(JobState.IN_PROGRESS), last, None, None)["estimated_time_remaining"] is None


def test_an_ended_workflow_has_links_or_an_error() -> None:
    output = {
        "images": [
            {"type": "url", "data": "http://g/a.png", "mime_type": "image/png"},
            {"type": "url", "data": "http://g/v.mp4", "mime_type": "video/mp4"},
            {"type": "base64", "data": "aGk=", "url": "http://bucket/b.png", "mime_type": "image/png"},
        ],
        "audio": [{"type": "url", "data": "http://g/a.flac"}],
        "texts": [{"node_id": "5", "text": "hello"}],
        "errors": ["one of two is missing"],
    }
    done = status_body(record(JobState.COMPLETED, output=output), None, None, output)
    assert done == {
        **EMPTY,
        "status": "completed",
        "progress": 100.0,
        "output_images": ["http://g/a.png", "http://bucket/b.png"],
        "output_videos": ["http://g/v.mp4"],
        "output_audio": ["http://g/a.flac"],
        "texts": ["hello"],
        "warnings": ["one of two is missing"],
        "estimated_time_remaining": 0,
    }
    for state in (JobState.FAILED, JobState.TIMED_OUT):
        error = {"error": "It went wrong", "code": "x", "hint": "Mend it"}
        failed = status_body(record(state, error=error), {"percent": 40.0}, None, None)
        assert failed["status"] == "failed"
        assert (failed["error"], failed["error_code"], failed["error_hint"]) == ("It went wrong", "x", "Mend it")
        assert failed["progress"] == 40.0
    assert status_body(record(JobState.CANCELLED), None, None, None)["status"] == "cancelled"


# ------------------------------------------------------------------------------------------------- a bug


# ---------------------------------------------------------------------------------------------- versions


def test_versions_survive_a_restart(tmp_path: Path) -> None:
    folder, kept = tmp_path / "workflows", tmp_path / "kept"
    folder.mkdir()
    versions = []
    for color in (1, 2):
        (folder / "mine.json").write_text(json.dumps(picture((0, 0, color))), encoding="utf-8")
        manifest = {"title": f"Colour {color}", "description": ""}
        (folder / "mine.manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        versions.append(VersionedCatalog(folder, StoredVersions(kept)).get("mine").version)
    found = VersionedCatalog(folder, StoredVersions(kept))
    assert [found.get("mine", version).version for version in versions] == versions
    assert found.get("mine", versions[0]).graph["1"]["inputs"]["color"] == 1
    assert found.get("mine", versions[0]).manifest.title == "Colour 1"
    (folder / "mine.json").unlink()
    (folder / "mine.manifest.json").unlink()
    assert VersionedCatalog(folder, StoredVersions(kept)).get("mine", versions[1]).version == versions[1]


def test_a_modified_stored_version_is_ignored(tmp_path: Path) -> None:
    entry = make_entry("mine", picture((1, 2, 3)))
    StoredVersions(tmp_path).add(entry)
    file = tmp_path / "mine" / f"{entry.version}.json"
    assert list(StoredVersions(tmp_path).versions["mine"]) == [entry.version]
    for content in ("{", "{}", json.dumps({"graph": picture((1, 2, 4)), "manifest": None})):
        file.write_text(content, encoding="utf-8")
        assert not StoredVersions(tmp_path).versions["mine"]


def test_stored_versions_are_limited(tmp_path: Path) -> None:
    stored = StoredVersions(tmp_path)
    for width in range(MAX_VERSIONS + 3):
        stored.add(make_entry("mine", {"1": node("EmptyImage", width=width)}))
    assert len(list((tmp_path / "mine").iterdir())) == MAX_VERSIONS
    last = make_entry("mine", {"1": node("EmptyImage", width=MAX_VERSIONS + 2)})
    assert next(reversed(StoredVersions(tmp_path).versions["mine"])) == last.version


def test_an_unwritable_disk_is_tolerated(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file", encoding="utf-8")
    StoredVersions(tmp_path / "kept").add(make_entry("mine", picture((1, 2, 3))))


def test_many_wrong_names_are_counted_and_only_a_few_explained() -> None:
    graph = {"6": {"class_type": "X", "inputs": {f"input_{number}": 0 for number in range(1500)}}}
    with pytest.raises(InvalidInput) as refused:
        with_inputs(graph, {f"6.inputs_{number}" + "a1" * 5000: 1 for number in range(1500)})
    assert refused.value.message.endswith("; and 1490 more")
    assert len(refused.value.message) < 5000
