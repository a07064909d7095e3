"""Every requirement has an upper bound, and the locks hold what the requirements ask for, on every Python."""

from __future__ import annotations

import re
import sys
from functools import cache
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = {path.stem: path for path in sorted((ROOT / "locks").glob("*.txt"))}
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def worker() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def extra(name: str) -> list[Requirement]:
    """Return what an extra asks for, and what those extras of ours ask for that it names."""
    asked = []
    for one in map(Requirement, PROJECT["project"]["optional-dependencies"][name]):
        asked += [need for part in sorted(one.extras) for need in extra(part)] if one.name == "comfy-worker" else [one]
    return asked


def group(name: str) -> list[Requirement]:
    return [Requirement(line) for line in PROJECT["dependency-groups"][name]]


ASKED = {
    "worker": worker() + group("build"),
    "emulator": worker() + extra("emulator") + group("build"),
    "fleet": worker() + extra("fleet") + group("build"),
    "dev": worker() + extra("dev") + group("build"),
    "uv": group("uv"),
}


@cache
def pins(lock: str) -> list[Requirement]:
    lines = LOCKS[lock].read_text().splitlines()
    return [Requirement(line.rstrip(" \\")) for line in lines if line and line[0] not in " #"]


def versions(lock: str, python: str) -> dict[str, list[Version]]:
    """Return what a lock installs on Linux with a Python."""
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    found: dict[str, list[Version]] = {}
    for pin in pins(lock):
        if pin.marker is None or pin.marker.evaluate(machine):
            found.setdefault(canonicalize_name(pin.name), []).extend(Version(one.version) for one in pin.specifier)
    return found


def is_bounded(requirement: Requirement) -> bool:
    return any(one.operator in ("<", "<=", "==", "~=") for one in requirement.specifier)


def test_every_requirement_has_an_upper_bound() -> None:
    asked = {one for requirements in ASKED.values() for one in requirements}
    asked |= {Requirement(line) for line in PROJECT["build-system"]["requires"]}
    assert len(asked) > 40
    assert sorted(str(one) for one in asked if not is_bounded(one)) == []


def test_the_locks_include_the_build_requirements() -> None:
    assert PROJECT["dependency-groups"]["build"] == PROJECT["build-system"]["requires"]


def test_every_installation_has_a_lock() -> None:
    assert LOCKS.keys() == ASKED.keys()


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", ASKED)
def test_a_lock_includes_its_requirements(lock: str, python: str) -> None:
    """`make lock` mends it."""
    locked = versions(lock, python)
    assert {name: found for name, found in locked.items() if len(found) != 1} == {}
    for one in ASKED[lock]:
        if one.marker is None or one.marker.evaluate({"python_version": python}):
            [version] = locked[canonicalize_name(one.name)]
            assert one.specifier.contains(version, prereleases=True), one


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", ["worker", "emulator", "fleet"])
def test_the_image_has_the_tested_versions(lock: str, python: str) -> None:
    tested = versions("dev", python)
    assert {name: found for name, found in versions(lock, python).items() if tested.get(name) != found} == {}


@pytest.mark.parametrize("lock", ASKED)
def test_every_pin_has_hashes_and_names_no_index(lock: str) -> None:
    text = LOCKS[lock].read_text()
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)
    blocks = re.split(r"\n(?=[A-Za-z0-9])", "\n" + text)[1:]
    assert len(blocks) == len(pins(lock))
    assert [block.split(" ")[0] for block in blocks if "--hash=sha256:" not in block] == []
