"""What docs/how-to/catalog.md tells is so: its examples, and the table of what there is."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import pytest

from comfy_worker.catalog.entry import fill
from comfy_worker.catalog.library import Catalog
from comfy_worker.catalog.manifest import Manifest
from comfy_worker.catalog.parameter import Parameter
from comfy_worker.catalog.template import expand
from comfy_worker.errors import InvalidInput
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/how-to/catalog.md").read_text(encoding="utf-8")
LIBRARY = Catalog(ROOT / "workflows")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def requests() -> list[dict[str, Any]]:
    """Return the inputs of all requests on the page."""
    quoted = [text for block in blocks("bash") for text in re.findall(r"'\s*(\{.*?\})'", block, re.DOTALL)]
    found = [json.loads(text) for text in [*quoted, *blocks("json")]]
    return [request["input"] for request in found if "input" in request]


def test_every_request_can_be_filled_in() -> None:
    templates = [request["template"] for request in requests()]
    assert templates == ["solid-color", "text-to-image-sd15", "upscale"]
    for request in requests():
        assert expand(request, LIBRARY)["workflow"]


def test_the_documented_error_is_exact() -> None:
    [documented] = [json.loads(block) for block in blocks("json") if '"error"' in block]
    with pytest.raises(InvalidInput) as refused:
        expand({"template": "solid-color", "inputs": {"widht": 5, "height": 5000}}, LIBRARY)
    assert refused.value.as_output() == documented


def test_the_example_is_a_valid_manifest() -> None:
    [manifest] = [json.loads(block) for block in blocks("json") if '"parameters"' in block]
    assert Manifest.model_validate(manifest).parameters["seed"].is_random


def test_the_table_has_every_entry_and_its_requirements() -> None:
    section = PAGE.partition("## Ready-made workflows")[2].partition("## A workflow of your own")[0]
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| [^|]+ \| ([^|]+) \|", section, re.MULTILINE)
    documented = {name: set(re.findall(r"`(\w+)`", needs)) for name, needs in rows}
    assert documented == {
        entry.name: {name for name, one in entry.manifest.parameters.items() if one.is_required}
        for entry in LIBRARY.entries()
    }


def test_every_parameter_field_is_documented() -> None:
    section = PAGE.partition("### Parameters")[2].partition("## Versions")[0]
    assert [field for field in Parameter.model_fields if f"`{field}`" not in section] == []


def test_the_documented_map_works() -> None:
    inputs = {"prompt": "x", "duration": 5}
    workflow = fill(LIBRARY.get("text-to-video-hunyuan"), inputs, Random(1)).workflow
    assert workflow["8"]["inputs"]["length"] == 121
