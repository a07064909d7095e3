"""Nodes and lists: a node is called once per list item, and the results are merged (`execution.py` of ComfyUI)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from comfy_emulator.node_api import NodeResult


def slice_inputs(inputs: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the arguments of each call; shorter lists repeat their last item (`_async_map_node_over_list`)."""
    calls = max((len(values) for values in inputs.values()), default=0)
    if calls == 0:
        yield {}
    for index in range(calls):
        yield {name: values[min(index, len(values) - 1)] for name, values in inputs.items()}


def merge_outputs(results: Sequence[NodeResult], output_is_list: Sequence[bool]) -> list[list[Any]]:
    """Return the values of each output slot over all calls; lists are concatenated (`merge_result_data`)."""
    merged = []
    for slot, is_list in enumerate(output_is_list):
        values = [result.outputs[slot] for result in results]
        merged.append([item for value in values for item in value] if is_list else values)
    return merged


def merge_ui(results: Sequence[NodeResult]) -> dict[str, list[Any]]:
    """Return the concatenated `ui` of all calls, empty if there is none (`get_output_from_returns`)."""
    uis = [result.ui for result in results if result.ui is not None]
    if not uis:
        return {}
    return {key: [item for ui in uis for item in ui[key]] for key in uis[0]}
