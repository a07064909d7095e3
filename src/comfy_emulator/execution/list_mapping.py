"""How a node meets lists: it is called for each item, and what it gives is put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from comfy_emulator.node_api import NodeResult


def slices(inputs: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Give the arguments of each call; the last item of a shorter list is used for the remaining calls."""
    calls = max((len(values) for values in inputs.values()), default=0)
    if calls == 0:
        yield {}
    for index in range(calls):
        yield {name: values[min(index, len(values) - 1)] for name, values in inputs.items()}


def merge_outputs(results: Sequence[NodeResult], output_is_list: Sequence[bool]) -> list[list[Any]]:
    """Give the list of values of each output slot over all calls; an output that is a list is strung together."""
    merged = []
    for slot, is_list in enumerate(output_is_list):
        values = [result.outputs[slot] for result in results]
        merged.append([item for value in values for item in value] if is_list else values)
    return merged


def merge_ui(results: Sequence[NodeResult]) -> dict[str, list[Any]]:
    """String together what the calls report to the client; empty when none reports anything."""
    reports = [result.ui for result in results if result.ui is not None]
    if not reports:
        return {}
    return {key: [item for report in reports for item in report[key]] for key in reports[0]}
