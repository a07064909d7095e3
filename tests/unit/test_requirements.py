"""`pip install -r requirements.txt` brings all that the worker and the gateway import; extras bring the rest."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

PACKAGE = ROOT / "src" / "comfy_worker"
FLEET = set((PACKAGE / "gateway/engines/celery").rglob("*.py"))
EMULATOR = set((PACKAGE.parent / "comfy_emulator").rglob("*.py"))
GATEWAY_AND_WORKER = {ROOT / "handler.py", *PACKAGE.rglob("*.py")} - FLEET - EMULATOR


def required() -> set[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {Requirement(line).name for line in lines if line and not line.startswith("#")}


def extra(name: str) -> set[str]:
    found = re.search(rf"^{name} = (\[.*?\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return {Requirement(line).name for line in ast.literal_eval(found[1])}


def brought_by(names: set[str]) -> set[str]:
    """Return distributions with all that is installed with them, whatever the machine."""
    found: set[str] = set()
    open_ones = [canonicalize_name(name) for name in names]
    while open_ones:
        one = open_ones.pop()
        if one in found:
            continue
        found.add(one)
        needed = [Requirement(line) for line in requires(one) or []]
        open_ones += [canonicalize_name(need.name) for need in needed if need.marker is None or need.marker.evaluate()]
    return found


@cache
def distributions_of_packages() -> dict[str, set[str]]:
    """Return each package that can be imported, and what brings it; Python 3.10's own table lacks most of them."""
    found: dict[str, set[str]] = {}
    for one in distributions():
        name = canonicalize_name(one.metadata["Name"])
        # Not `files`, which looks for each of them on the disk.
        for line in (one.read_text("RECORD") or "").splitlines():
            found.setdefault(line.partition(",")[0].partition("/")[0].partition(".")[0], set()).add(name)
    return found


def imported(files: set[Path]) -> Iterator[tuple[str, str]]:
    """Yield each package of others that files import, and the file."""
    for file in sorted(files):
        for node in run(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for package in (
                {name.partition(".")[0] for name in names}
                - sys.stdlib_module_names
                - {"comfy_worker", "comfy_emulator"}
            ):
                yield package, str(file.relative_to(ROOT))


def run(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the parts of a program without what only a type checker reads."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    yield node
    for part in ast.iter_child_nodes(node):
        yield from run(part)


@pytest.mark.parametrize(
    ("files", "extras"), [(GATEWAY_AND_WORKER, ()), (FLEET, ("fleet",)), (EMULATOR, ("emulator",))]
)
def test_each_package_that_is_imported_is_installed(files: set[Path], extras: tuple[str, ...]) -> None:
    assert files
    names = required().union(*map(extra, extras))
    brought = brought_by(names)
    bringers = distributions_of_packages()
    missing = {(package, file) for package, file in imported(files) if not bringers[package] & brought}
    assert missing == set()


def test_the_image_and_the_package_install_the_same_list() -> None:
    assert 'dependencies = { file = ["requirements.txt"] }' in (ROOT / "pyproject.toml").read_text()
    assert "pip install --require-hashes --requirement locks/worker.txt" in (ROOT / "Dockerfile").read_text()
