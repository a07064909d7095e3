"""A request fills in a named workflow, or hears of everything that is wrong with it."""

from __future__ import annotations

import copy
import json
import re
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.catalog.entry import CatalogEntry, Filled, fill, is_entry_name, make_entry
from comfy_worker.errors import InvalidInput, InvalidWorkflow, UiFormatWorkflow
from tests.support.comfyui.graphs import data_uri, node, png

GRAPH: dict[str, Any] = {
    "1": node("LoadImage", image="image.png"),
    "2": node("Sampler", image=["1", 0], seed=0, steps=20, cfg=7.0, text="", tiling=False, other_seed=0),
    "9": node("SaveImage", images=["2", 0], filename_prefix="x"),
}


def sets(*inputs: str, node_id: str = "2") -> list[dict[str, str]]:
    return [{"node": node_id, "input": name} for name in inputs]


PARAMETERS: dict[str, Any] = {
    "image": {"type": "file", "description": "", "sets": sets("image", node_id="1")},
    "prompt": {"type": "string", "description": "", "sets": sets("text")},
    "steps": {"type": "integer", "description": "", "default": 20, "minimum": 1, "maximum": 150, "sets": sets("steps")},
    "cfg": {"type": "number", "description": "", "default": 7.0, "sets": sets("cfg")},
    "tiling": {"type": "boolean", "description": "", "default": False, "sets": sets("tiling")},
    "seed": {
        "type": "integer",
        "description": "",
        "default": "__RANDOM_INT__",
        "minimum": 0,
        "maximum": 2**64 - 1,
        "sets": sets("seed", "other_seed"),
    },
}
MANIFEST = {"title": "A title", "description": "", "parameters": PARAMETERS}
PICTURE = data_uri(png((255, 0, 0)))
NEEDED = {"image": PICTURE, "prompt": "a hill"}


@pytest.fixture(scope="module")
def entry() -> CatalogEntry:
    return make_entry("example", GRAPH, MANIFEST)


def filled(entry: CatalogEntry, **inputs: Any) -> Filled:
    return fill(entry, {**NEEDED, **inputs}, Random(7))


def refusal(entry: CatalogEntry, inputs: dict[str, Any]) -> str:
    with pytest.raises(InvalidInput) as refused:
        fill(entry, inputs, Random(7))
    return refused.value.message


def test_omitted_inputs_have_their_defaults(entry: CatalogEntry) -> None:
    inputs = filled(entry, steps=5.0, seed=3).workflow["2"]["inputs"]
    assert inputs == {
        "image": ["1", 0],
        "seed": 3,
        "steps": 5,
        "cfg": 7.0,
        "text": "a hill",
        "tiling": False,
        "other_seed": 3,
    }


def test_null_counts_as_omitted(entry: CatalogEntry) -> None:
    assert filled(entry, steps=None).workflow["2"]["inputs"]["steps"] == 20
    assert "prompt is missing" in refusal(entry, {**NEEDED, "prompt": None})


def test_every_request_gets_a_new_seed(entry: CatalogEntry) -> None:
    random = Random(7)
    seeds = [fill(entry, NEEDED, random).workflow["2"]["inputs"]["seed"] for _ in range(20)]
    assert len(set(seeds)) == 20
    assert all(0 <= seed < 2**53 for seed in seeds), "every program reads it exactly"


def test_all_problems_are_in_one_sentence(entry: CatalogEntry) -> None:
    sentence = refusal(entry, {"promt": "x", "steps": 0, "cfg": "7", "zzz": 1, "image": 5})
    assert sentence == (
        "The inputs of the template 'example' are refused: 'promt' is unknown, did you mean 'prompt'?; 'zzz' is "
        "unknown, the parameters are 'image', 'prompt', 'steps', 'cfg', 'tiling', 'seed'; image must be a file: "
        "base64, a data URI or a URL; prompt is missing; steps must be at least 1; cfg must be a number"
    )


def test_a_long_unknown_name_does_not_fill_the_sentence(entry: CatalogEntry) -> None:
    assert len(refusal(entry, {**NEEDED, "x" * 100_000: 1})) < 300


@pytest.mark.parametrize(
    ("file", "image"),
    [
        (PICTURE, {"name": "image.png", "image": PICTURE}),
        (PICTURE.partition(",")[2], {"name": "image.png", "image": PICTURE.partition(",")[2]}),
        ("AAAA", {"name": "image", "image": "AAAA"}),
        ("https://example.com/a%20b.JPG?x=1", {"name": "image.JPG", "url": "https://example.com/a%20b.JPG?x=1"}),
        ("S3://bucket/key", {"name": "image", "url": "S3://bucket/key"}),
    ],
)
def test_a_file_becomes_an_image_of_the_job(entry: CatalogEntry, file: str, image: dict[str, str]) -> None:
    result = filled(entry, image=file)
    assert list(result.images) == [image]
    assert result.workflow["1"]["inputs"]["image"] == image["name"]


def test_a_graph_without_a_manifest_is_an_entry_without_parameters() -> None:
    bare = make_entry("bare", {"prompt": GRAPH})
    assert (bare.manifest.title, bare.manifest.parameters) == ("bare", {})
    assert fill(bare, {}, Random()) == Filled(GRAPH, [])
    assert "'steps' is unknown, there are no parameters" in refusal(bare, {"steps": 1})


def test_an_invalid_graph_is_not_an_entry() -> None:
    with pytest.raises(UiFormatWorkflow):
        make_entry("canvas", {"nodes": [], "links": []})
    with pytest.raises(InvalidWorkflow):
        make_entry("empty", {})


def test_the_version_depends_on_the_content(entry: CatalogEntry) -> None:
    def version(graph: Any, manifest: Any = None) -> str:
        return make_entry("other", graph, manifest).version

    assert re.fullmatch("[0-9a-f]{12}", entry.version)
    assert version(json.loads(json.dumps(GRAPH, indent=1)), dict(reversed(MANIFEST.items()))) == entry.version
    assert version(GRAPH) != entry.version
    assert version(GRAPH, {**MANIFEST, "title": "Another"}) != entry.version
    assert version({**GRAPH, "10": GRAPH["9"]}, MANIFEST) != entry.version


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        *((name, True) for name in ("a", "text-to-image_v1.5", "9")),
        *((name, False) for name in ("", "A", "-a", "a/b", "a\n", ".a", "é")),
    ],
)
def test_allowed_names(name: str, allowed: bool) -> None:
    assert is_entry_name(name) is allowed


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(PICTURE)


@given(st.dictionaries(st.sampled_from(list(PARAMETERS)) | st.text(), VALUES, max_size=6))
def test_inputs_never_change_the_entry(inputs: dict[str, Any]) -> None:
    graph = copy.deepcopy(GRAPH)
    entry = make_entry("example", graph, MANIFEST)
    try:
        result = fill(entry, inputs, Random(7))
    except InvalidInput as refused:
        assert refused.message.startswith("The inputs of the template 'example' are refused: ")
    else:
        assert {node_id: set(node["inputs"]) for node_id, node in result.workflow.items()} == {
            node_id: set(node["inputs"]) for node_id, node in GRAPH.items()
        }
        result.workflow["2"]["inputs"]["image"].append("changed")
    assert graph == GRAPH


@given(st.integers(1, 150), st.floats(-1e6, 1e6), st.booleans(), st.text(), st.integers(0, 2**64 - 1))
def test_valid_inputs_are_set_unchanged(steps: int, cfg: float, tiling: bool, text: str, seed: int) -> None:
    entry = make_entry("example", GRAPH, MANIFEST)
    wanted = {"steps": steps, "cfg": cfg, "tiling": tiling, "seed": seed}
    inputs = filled(entry, prompt=text, **wanted).workflow["2"]["inputs"]
    assert {**wanted, "text": text, "other_seed": seed, "image": ["1", 0]} == inputs
