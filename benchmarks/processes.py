"""Processes that a benchmark starts beside itself, and what they take of the machine; for Linux."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_END_S = 30.0


@contextmanager
def module(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run `python -m …` until the end of the block; what it prints is not shown."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "ENV_FILE": "", **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_s(pid: int) -> float:
    """Return how many CPU seconds a process and its children have taken, those included that have ended."""
    children: dict[int, list[int]] = {}
    fields = dict(_stats())
    for own, stat in fields.items():
        children.setdefault(int(stat[1]), []).append(own)
    ticks, open_pids = 0, [pid]
    while open_pids:
        one = open_pids.pop()
        # Of the process itself, and of its children that have ended: utime, stime, cutime, cstime.
        ticks += sum(map(int, fields[one][11:15])) if one in fields else 0
        open_pids += children.get(one, [])
    return ticks / _TICKS


def parent_of(pid: int) -> int:
    """Return who started a process."""
    return int(_fields(Path(f"/proc/{pid}"))[1])


def machine_s() -> tuple[float, float]:
    """Return how many CPU seconds this machine has worked, and how many it was idle, on all its cores."""
    user, nice, system, idle, waiting, *rest = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(rest)) / _TICKS, (idle + waiting) / _TICKS


def _stats() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                yield int(folder.name), _fields(folder)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended


def _fields(folder: Path) -> list[str]:
    """Return what stands behind the process's name, which may have spaces: its state, its parent, ..."""
    return (folder / "stat").read_text().rpartition(")")[2].split()
