"""RunPod's `input.template` becomes a workflow with images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.catalog.library import Catalog
from comfy_worker.catalog.template import expand, expand_job
from comfy_worker.errors import InvalidInput
from comfy_worker.job.payload import parse_job
from tests.support.comfyui.graphs import data_uri, picture, png
from tests.support.paths import ROOT

PICTURE = data_uri(png((0, 0, 255)))
RESIZE = {"template": "resize-picture", "inputs": {"image": PICTURE, "width": 16}}


@pytest.fixture(scope="module")
def library() -> Catalog:
    return Catalog(ROOT / "workflows")


def refusal(job_input: dict[str, Any], library: Catalog) -> str:
    with pytest.raises(InvalidInput) as refused:
        expand(job_input, library)
    return refused.value.message


def test_a_template_becomes_a_workflow_with_its_images(library: Catalog) -> None:
    expanded = expand({**RESIZE, "timeout_s": 5}, library)
    assert set(expanded) == {"workflow", "images", "timeout_s"}
    assert expanded["workflow"]["1"]["inputs"]["image"] == "image.png"
    assert expanded["workflow"]["2"]["inputs"]["width"] == 16
    assert expanded["images"] == [{"name": "image.png", "image": PICTURE}]
    job = parse_job({"id": "x", "input": expanded})
    assert job.warnings == ()
    assert job.files[0].content == png((0, 0, 255))


def test_the_jobs_images_are_kept(library: Catalog) -> None:
    own = {"name": "own.png", "image": PICTURE}
    assert [item["name"] for item in expand({**RESIZE, "images": [own]}, library)["images"]] == ["own.png", "image.png"]
    without = expand({"template": "solid-color"}, library)
    assert "images" not in without
    with pytest.raises(InvalidInput, match=r"input\.images must be a list"):
        parse_job({"input": expand({**RESIZE, "images": "x"}, library)})


def test_a_version_can_be_requested(library: Catalog) -> None:
    version = library.get("solid-color").version
    expanded = expand({"template": f"solid-color@{version}", "inputs": None}, library)
    assert expanded["workflow"]["1"]["class_type"] == "EmptyImage"
    assert "has no version '123'" in refusal({"template": "solid-color@123"}, library)
    assert "The version is missing" in refusal({"template": "solid-color@"}, library)


@pytest.mark.parametrize(
    ("job_input", "sentence"),
    [
        ({"template": "solid-color", "workflow": {}}, "input has both a workflow and a template; send one of them"),
        ({"template": 5}, "input.template must be a string: a name, or name@version"),
        ({"template": "solid-color", "inputs": []}, "input.inputs must be an object"),
        ({"template": "solid_color"}, "There is no template 'solid_color': did you mean 'solid-color'?"),
        (
            {"template": "solid-color", "inputs": {"width": 0}},
            "The inputs of the template 'solid-color' are refused: width must be at least 1",
        ),
    ],
)
def test_rejected_templates(library: Catalog, job_input: dict[str, Any], sentence: str) -> None:
    assert refusal(job_input, library) == sentence


@pytest.mark.parametrize("job_input", [{"workflow": picture((0, 0, 0))}, {"template": None, "workflow": {}}, {}])
def test_an_input_without_a_template_is_returned_as_it_is(library: Catalog, job_input: dict[str, Any]) -> None:
    assert expand(job_input, library) is job_input


@pytest.mark.parametrize(
    "job_input", [None, "", "{", "[" * 100_000, "[]", "5", [], {"workflow": {}}, '{"workflow": {}}']
)
def test_a_job_without_a_template_is_returned_as_it_is(library: Catalog, job_input: Any) -> None:
    job = {"id": "x", "input": job_input}
    assert expand_job(job, library) is job


def test_an_input_that_is_a_string_is_expanded_too(library: Catalog) -> None:
    job = {"id": "x", "policy": {}, "input": json.dumps(RESIZE)}
    expanded = expand_job(job, library)
    assert expanded == {"id": "x", "policy": {}, "input": expand(RESIZE, library)}
    assert expand_job(expanded, library) is expanded


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["solid-color", "resize-picture", "text-to-video-hunyuan", "solid-color@", "@", "../x"])
INPUTS = st.dictionaries(st.sampled_from(["width", "image", "color", "seed", "style"]) | st.text(), VALUES, max_size=4)


@given(st.fixed_dictionaries({"template": NAMES | VALUES}, optional={"inputs": INPUTS | VALUES, "images": VALUES}))
def test_any_input_is_expanded_or_refused(job_input: dict[str, Any]) -> None:
    try:
        expanded = expand(job_input, LIBRARY)
    except InvalidInput as refused:
        assert refused.message
        return
    assert job_input["template"] is None or set(expanded) <= {"workflow", "images"}


LIBRARY = Catalog(Path(ROOT) / "workflows")
