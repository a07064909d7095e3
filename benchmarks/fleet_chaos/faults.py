"""What befalls the fleet, by lot."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.fleet_chaos.site import Member, Site
from tests.support.network.links import Link, LinkState


@dataclass(frozen=True)
class Fault:
    """Something that befalls a part, and is over some time later.

    Attributes:
        name: its kind.
        part: whom it befalls; of two faults at a time each has another.
        begin: lets it happen.
        end: makes it good.
    """

    name: str
    part: str
    begin: Callable[[], None]
    end: Callable[[], None]


_Draw = Callable[[Site, random.Random], Fault]


_GATEWAY_KILLED = "gateway killed"


def _killed(what: str) -> _Draw:
    def draw(site: Site, lot: random.Random) -> Fault:
        member = lot.choice(site.gateways if what == "gateway" else site.workers)
        return Fault(f"{what} killed", member.name, member.kill, member.launch)

    return draw


def _redis_killed(site: Site, _lot: random.Random) -> Fault:
    return Fault("Redis killed", "Redis", lambda: site.redis.stop(signal.SIGKILL), site.redis.start)


def _redis_emptied(site: Site, _lot: random.Random) -> Fault:
    def end() -> None:
        site.redis.forget()
        site.redis.start()

    return Fault("Redis killed, back empty", "Redis", lambda: site.redis.stop(signal.SIGKILL), end)


def _postgres_ended(name: str, number: signal.Signals) -> _Draw:
    def draw(site: Site, _lot: random.Random) -> Fault:
        return Fault(name, "PostgreSQL", lambda: site.postgres.stop(number), site.postgres.start)

    return draw


def _weather(what: str, server: str, weather: LinkState) -> _Draw:
    """Return what draws whose links to a server change: those of one process, or of all."""

    def links_of(members: list[Member]) -> list[Link]:
        return [member.to_redis if server == "Redis" else member.to_postgres for member in members]

    def draw(site: Site, lot: random.Random) -> Fault:
        members = lot.choice([site.members, [lot.choice(site.members)]])
        links = links_of(members)
        whose = "of all" if len(members) > 1 else "of one"

        def turn(weather: LinkState) -> None:
            for link in links:
                link.turn(weather)

        name = f"links {whose} to {server} {what}"
        return Fault(name, f"links to {server}", lambda: turn(weather), lambda: turn(LinkState.FAIR))

    return draw


_KINDS: tuple[_Draw, ...] = (
    _killed("worker"),
    _killed("gateway"),
    _redis_killed,
    _redis_emptied,
    _postgres_ended("PostgreSQL killed", signal.SIGKILL),
    _postgres_ended("PostgreSQL crashed", signal.SIGQUIT),
    *(
        _weather(what, server, weather)
        for server in ("Redis", "PostgreSQL")
        for what, weather in (
            ("cut", LinkState.CUT),
            ("silent", LinkState.SILENT),
            ("without answers", LinkState.ANSWERLESS),
        )
    ),
)
KINDS = len(_KINDS)
_TWO_AT_A_TIME = 0.3


@dataclass(frozen=True)
class Misfortune:
    """One fault or two at a time, how long the fleet has had peace before, and how long it lasts, in seconds."""

    faults: tuple[Fault, ...]
    peace_s: float
    lasts_s: float

    def strike(self, killed_at: list[float]) -> None:
        """Let it happen; return when it is made good. When a gateway is killed is noted, on the monotonic clock."""
        time.sleep(self.peace_s)
        for fault in self.faults:
            fault.begin()
            if fault.name == _GATEWAY_KILLED:
                killed_at.append(time.monotonic())
        time.sleep(self.lasts_s)
        for fault in self.faults:
            fault.end()


def misfortunes(site: Site, count: int, lot: random.Random, longest_s: float) -> Iterator[Misfortune]:
    """Yield so many faults, each kind as often as the others; none lasts for longer than `longest_s`."""
    drawn: list[Fault] = []
    while len(drawn) < count:
        drawn += [draw(site, lot) for draw in lot.sample(_KINDS, len(_KINDS))]
    left = drawn[:count]
    while left:
        faults = [left.pop(0)]
        if left and left[0].part != faults[0].part and lot.random() < _TWO_AT_A_TIME:
            faults.append(left.pop(0))
        yield Misfortune(tuple(faults), lot.uniform(0.0, longest_s / 2), lot.uniform(0.2, longest_s))
