"""The rounds of a soak, drawn by lot: the same seed and number of jobs give the same jobs and faults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from benchmarks.soak.faults import Fault, PlatformDown, PlatformMischief, Wire
from benchmarks.soak.kinds import OWN_KINDS, Draw
from benchmarks.soak.shapes import SHAPES, SoakJob

_ROUND_SIZES = (1, 2, 2, 3, 3, 4, 6)
_WITH_FAULT = 0.75
_WITH_TWO_FAULTS = 0.15
_TRACELESS = frozenset({"history_lost", "history_delay_s", "delete_pending"})
"""Faults after which ComfyUI does not know a prompt (yet): only the websocket tells what became of it."""
_UNKNOWABLE = frozenset({"comfyui_crashed", "cancelled"})
"""How a job may end of which neither the websocket nor the history tells."""

Card = TypeVar("Card")


@dataclass(frozen=True)
class Round:
    """Jobs that are submitted together, and what goes wrong meanwhile."""

    number: int
    jobs: tuple[SoakJob, ...]
    faults: tuple[Fault, ...]

    @property
    def codes_of_both(self) -> frozenset[str]:
        """What a job may fail with because of two faults at once that would do no harm one by one."""
        wires = [fault for fault in self.faults if isinstance(fault, Wire)]
        is_gone = any(_TRACELESS.intersection(wire.fields) for wire in wires)
        return _UNKNOWABLE if is_gone and any(wire.about_websocket for wire in wires) else frozenset()


def rounds(seed: int, jobs: int, kinds: Mapping[Draw, int] = OWN_KINDS) -> Iterator[Round]:
    """Yield rounds with `jobs` jobs together."""
    rng = Random(seed)
    shapes, faults_to_come = _deal(SHAPES, rng), _deal(kinds, rng)
    number, first = 0, 0
    while first < jobs:
        size = min(rng.choice(_ROUND_SIZES), jobs - first)
        faults = tuple(_draw_faults(faults_to_come, rng))
        wanted = [fault.needs for fault in faults if fault.needs is not None][:size]
        makers = wanted + [next(shapes) for _ in range(size - len(wanted))]
        rng.shuffle(makers)
        drawn = tuple(make(first + place, rng) for place, make in enumerate(makers))
        yield Round(number, drawn, faults)
        number, first = number + 1, first + size


def _deal(weights: Mapping[Card, int], rng: Random) -> Iterator[Card]:
    """Yield cards from a shuffled pack for ever; each comes as often as its weight says before the next pack."""
    while True:
        pack = [card for card, weight in weights.items() for _ in range(weight)]
        rng.shuffle(pack)
        yield from pack


def _draw_faults(kinds: Iterator[Draw], rng: Random) -> Iterator[Fault]:
    if rng.random() >= _WITH_FAULT:
        return
    first = next(kinds)(rng)
    yield first
    if rng.random() < _WITH_TWO_FAULTS:
        second = next(kinds)(rng)
        if _go_together(first, second):
            yield second


def _go_together(first: Fault, second: Fault) -> bool:
    """Return whether two faults do not undo each other, and ComfyUI can be told of both."""
    platforms = [isinstance(fault, (PlatformMischief, PlatformDown)) for fault in (first, second)]
    if any(platforms):
        return not all(platforms)
    if isinstance(first, Wire) and isinstance(second, Wire):
        return not first.fields.keys() & second.fields.keys()
    wire = first if isinstance(first, Wire) else second
    return isinstance(wire, Wire) and wire.delay_s is None
