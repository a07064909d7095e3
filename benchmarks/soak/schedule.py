"""The random rounds of a soak test; the same seed and number of jobs give the same rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from benchmarks.soak.fault_kinds import OWN_KINDS, FaultFactory
from benchmarks.soak.faults import BadPlatformResponse, EmulatorFault, Fault, PlatformDown
from benchmarks.soak.shapes import SHAPES, SoakJob

_ROUND_SIZES = (1, 2, 2, 3, 3, 4, 6)
_WITH_FAULT = 0.75
_WITH_TWO_FAULTS = 0.15
_TRACELESS = frozenset({"history_lost", "history_delay_s", "delete_pending"})
"""Faults after which ComfyUI does not know a prompt, so that only the WebSocket reports its end."""
_UNKNOWABLE = frozenset({"comfyui_crashed", "cancelled"})
"""Errors of a job whose end neither the WebSocket nor the history reports."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Round:
    """Jobs that are submitted together, and their faults."""

    number: int
    jobs: tuple[SoakJob, ...]
    faults: tuple[Fault, ...]

    @property
    def codes_of_combined_faults(self) -> frozenset[str]:
        """Errors of jobs under two simultaneous faults that are harmless alone."""
        emulator_faults = [fault for fault in self.faults if isinstance(fault, EmulatorFault)]
        is_unknown = any(_TRACELESS.intersection(emulator_fault.fields) for emulator_fault in emulator_faults)
        return (
            _UNKNOWABLE
            if is_unknown and any(emulator_fault.about_websocket for emulator_fault in emulator_faults)
            else frozenset()
        )


def rounds(seed: int, jobs: int, kinds: Mapping[FaultFactory, int] = OWN_KINDS) -> Iterator[Round]:
    """Yield rounds with `jobs` jobs in total."""
    rng = Random(seed)
    shapes, faults_to_come = _deal(SHAPES, rng), _deal(kinds, rng)
    number, first = 0, 0
    while first < jobs:
        size = min(rng.choice(_ROUND_SIZES), jobs - first)
        faults = tuple(_draw_faults(faults_to_come, rng))
        wanted = [fault.needs for fault in faults if fault.needs is not None][:size]
        makers = wanted + [next(shapes) for _ in range(size - len(wanted))]
        rng.shuffle(makers)
        drawn = tuple(make(first + index, rng) for index, make in enumerate(makers))
        yield Round(number, drawn, faults)
        number, first = number + 1, first + size


def _deal(weights: Mapping[Item, int], rng: Random) -> Iterator[Item]:
    """Yield items endlessly from shuffled packs, in each of which an item occurs as often as its weight."""
    while True:
        pack = [item for item, weight in weights.items() for _ in range(weight)]
        rng.shuffle(pack)
        yield from pack


def _draw_faults(kinds: Iterator[FaultFactory], rng: Random) -> Iterator[Fault]:
    if rng.random() >= _WITH_FAULT:
        return
    first = next(kinds)(rng)
    yield first
    if rng.random() < _WITH_TWO_FAULTS:
        second = next(kinds)(rng)
        if _are_compatible(first, second):
            yield second


def _are_compatible(first: Fault, second: Fault) -> bool:
    """Return whether two faults do not cancel each other, and both can be set on ComfyUI."""
    platforms = [isinstance(fault, (BadPlatformResponse, PlatformDown)) for fault in (first, second)]
    if any(platforms):
        return not all(platforms)
    if isinstance(first, EmulatorFault) and isinstance(second, EmulatorFault):
        return not first.fields.keys() & second.fields.keys()
    emulator_fault = first if isinstance(first, EmulatorFault) else second
    return isinstance(emulator_fault, EmulatorFault) and emulator_fault.delay_s is None
