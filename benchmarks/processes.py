"""Processes of benchmarks, and their CPU time (Linux only)."""

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
    """Run `python -m …` until the end of the block, without its output."""
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
    """Return the CPU seconds of a process and its children, including ended ones."""
    children: dict[int, list[int]] = {}
    fields = dict(_stats())
    for own, stat in fields.items():
        children.setdefault(int(stat[1]), []).append(own)
    ticks, pending = 0, [pid]
    while pending:
        current = pending.pop()
        # utime and stime of the process, cutime and cstime of its ended children: proc_pid_stat(5)
        ticks += sum(map(int, fields[current][11:15])) if current in fields else 0
        pending += children.get(current, [])
    return ticks / _TICKS


def parent_of(pid: int) -> int:
    """Return the pid of the parent."""
    return int(_fields(Path(f"/proc/{pid}"))[1])


def machine_s() -> tuple[float, float]:
    """Return the busy and the idle CPU seconds of all cores since the boot."""
    user, nice, system, idle, waiting, *rest = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(rest)) / _TICKS, (idle + waiting) / _TICKS


def _stats() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                yield int(folder.name), _fields(folder)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended


def _fields(folder: Path) -> list[str]:
    """Return the fields after the process's name, which may contain spaces."""
    return (folder / "stat").read_text().rpartition(")")[2].split()
