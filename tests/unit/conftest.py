"""Unit tests start no process and use no network; those that have to are integration tests."""

from __future__ import annotations

import ipaddress
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

_FORBIDDEN = ("os.exec", "os.fork", "os.posix_spawn", "os.system", "socket.bind", "socket.connect", "subprocess.Popen")
_seen: list[str] | None = None
"""What the running test did of it; None between tests."""


class NotAUnitTest(AssertionError):
    """A test of this folder used the network or started a process."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    # Other threads may be those that integration tests left in the same process, which connect again for a while.
    if _seen is None or threading.current_thread() is not threading.main_thread():
        return
    if not (event in _FORBIDDEN or (event == "socket.getaddrinfo" and _is_name(arguments[0]))):
        return
    _seen.append(f"{event} {arguments[-1] if event.startswith('socket.') else arguments[:2]}")
    raise NotAUnitTest(f"{_seen[-1]}: unit tests neither start processes nor use the network. See tests/integration.")


def _is_name(host: object) -> bool:
    try:
        ipaddress.ip_address(str(host))
    except ValueError:
        return host is not None
    return False


# A hook cannot be removed; it does nothing between unit tests.
sys.addaudithook(_watch)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Watch each test of this folder, with its fixtures; pytest calls this for those of other folders too."""
    global _seen
    if not item.path.is_relative_to(Path(__file__).parent):
        return (yield)
    _seen = []
    try:
        return (yield)
    finally:
        _seen = None


@pytest.fixture(autouse=True)
def no_network_no_processes() -> Iterator[None]:
    """Fail a test that connects, listens or starts a process, even if the code under test hides the error."""
    yield
    assert not _seen, NotAUnitTest("; ".join(_seen or ()))
