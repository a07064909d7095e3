"""The faults of a fleet, and their random order."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.fleet_chaos.fleet import ChaosFleet, Member
from tests.support.network.links import Link, LinkState


@dataclass(frozen=True)
class Fault:
    """A fault of one part of the fleet.

    Attributes:
        name: the kind of fault.
        part: the part; two simultaneous faults have different ones.
        begin: starts the fault.
        end: ends it.
    """

    name: str
    part: str
    begin: Callable[[], None]
    end: Callable[[], None]


_FaultFactory = Callable[[ChaosFleet, random.Random], Fault]


_GATEWAY_KILLED = "gateway killed"


def _killed(what: str) -> _FaultFactory:
    def draw(fleet: ChaosFleet, rng: random.Random) -> Fault:
        member = rng.choice(fleet.gateways if what == "gateway" else fleet.workers)
        return Fault(f"{what} killed", member.name, member.kill, member.launch)

    return draw


def _redis_killed(fleet: ChaosFleet, _rng: random.Random) -> Fault:
    return Fault("Redis killed", "Redis", lambda: fleet.redis.stop(signal.SIGKILL), fleet.redis.start)


def _redis_emptied(fleet: ChaosFleet, _rng: random.Random) -> Fault:
    def end() -> None:
        fleet.redis.forget()
        fleet.redis.start()

    return Fault("Redis killed, back empty", "Redis", lambda: fleet.redis.stop(signal.SIGKILL), end)


def _postgres_ended(name: str, number: signal.Signals) -> _FaultFactory:
    def draw(fleet: ChaosFleet, _rng: random.Random) -> Fault:
        return Fault(name, "PostgreSQL", lambda: fleet.postgres.stop(number), fleet.postgres.start)

    return draw


def _link_state(what: str, server: str, state: LinkState) -> _FaultFactory:
    """Return a factory of faults of links to a server, either of one process or of all."""

    def links_of(members: list[Member]) -> list[Link]:
        return [member.to_redis if server == "Redis" else member.to_postgres for member in members]

    def draw(fleet: ChaosFleet, rng: random.Random) -> Fault:
        members = rng.choice([fleet.members, [rng.choice(fleet.members)]])
        links = links_of(members)
        scope = "of all" if len(members) > 1 else "of one"

        def set_state(state: LinkState) -> None:
            for link in links:
                link.turn(state)

        name = f"links {scope} to {server} {what}"
        return Fault(name, f"links to {server}", lambda: set_state(state), lambda: set_state(LinkState.FAIR))

    return draw


_KINDS: tuple[_FaultFactory, ...] = (
    _killed("worker"),
    _killed("gateway"),
    _redis_killed,
    _redis_emptied,
    _postgres_ended("PostgreSQL killed", signal.SIGKILL),
    _postgres_ended("PostgreSQL crashed", signal.SIGQUIT),
    *(
        _link_state(what, server, state)
        for server in ("Redis", "PostgreSQL")
        for what, state in (
            ("cut", LinkState.CUT),
            ("silent", LinkState.SILENT),
            ("without answers", LinkState.ANSWERLESS),
        )
    ),
)
KINDS = len(_KINDS)
_TWO_AT_ONCE = 0.3


@dataclass(frozen=True)
class FaultGroup:
    """One fault, or two at once, after a pause; times in seconds."""

    faults: tuple[Fault, ...]
    pause_s: float
    duration_s: float

    def apply(self, killed_at: list[float]) -> None:
        """Start and end the faults, and add the monotonic times of gateway kills to `killed_at`."""
        time.sleep(self.pause_s)
        for fault in self.faults:
            fault.begin()
            if fault.name == _GATEWAY_KILLED:
                killed_at.append(time.monotonic())
        time.sleep(self.duration_s)
        for fault in self.faults:
            fault.end()


def fault_groups(fleet: ChaosFleet, count: int, rng: random.Random, longest_s: float) -> Iterator[FaultGroup]:
    """Yield `count` faults, all kinds equally often, of at most `longest_s` seconds."""
    drawn: list[Fault] = []
    while len(drawn) < count:
        drawn += [draw(fleet, rng) for draw in rng.sample(_KINDS, len(_KINDS))]
    left = drawn[:count]
    while left:
        faults = [left.pop(0)]
        if left and left[0].part != faults[0].part and rng.random() < _TWO_AT_ONCE:
            faults.append(left.pop(0))
        yield FaultGroup(tuple(faults), rng.uniform(0.0, longest_s / 2), rng.uniform(0.2, longest_s))
