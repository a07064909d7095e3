"""The walls between the rooms: who may import whom, who does no I/O, what a start does not load."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import comfy_worker

PACKAGE = "comfy_worker"
SOURCE = Path(comfy_worker.__file__).parent
PURE = [
    "comfy_worker.errors",
    "comfy_worker.settings",
    "comfy_worker.types",
    "comfy_worker.graph.workflow",
    "comfy_worker.graph.file_references",
    "comfy_worker.job.progress",
    "comfy_worker.names",
    "comfy_worker.redact",
    "comfy_worker.strict_json",
    "comfy_worker.job.envelope",
    "comfy_worker.job.input_files",
    "comfy_worker.job.payload",
    "comfy_worker.serverless.prefetch",
    "comfy_worker.catalog.parameter",
    "comfy_worker.catalog.manifest",
    "comfy_worker.catalog.entry",
    "comfy_worker.comfy.protocol",
    "comfy_worker.comfy.validation",
    "comfy_worker.comfy.requirements",
    "comfy_worker.storage.endpoint",
]
OUTSIDE_WORLD = {
    "aiohttp",
    "asyncio",
    "boto3",
    "botocore",
    "http",
    "httpx",
    "io",
    "multiprocessing",
    "os",
    "pathlib",
    "requests",
    "runpod",
    "select",
    "shutil",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
    "urllib.request",
    "urllib3",
    "websocket",
}


def modules() -> dict[str, Path]:
    """Return every module of the package by its name."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = (PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports(name: str) -> Iterator[str]:
    """Yield the full names of what a module imports, wherever it does so; relative ones too."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = MODULES[name].name == "__init__.py"
            above = name.split(".")[: len(name.split(".")) - node.level + package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def own_imports(name: str) -> set[str]:
    return {imported for imported in imports(name) if imported in MODULES} - {PACKAGE}


def reachable(start: str) -> set[str]:
    """Return the modules that a module needs, at first or second hand."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for imported in own_imports(waiting.pop()) - found:
            found.add(imported)
            waiting.append(imported)
    return found


def is_in(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_the_pure_modules_exist() -> None:
    assert set(PURE) <= set(MODULES)
    assert own_imports("comfy_worker.job.pipeline"), "imports are found at all"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_no_io(name: str) -> None:
    assert {imported for imported in imports(name) if is_in(imported, OUTSIDE_WORLD)} == set()


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_only_pure_modules(name: str) -> None:
    assert own_imports(name) <= set(PURE)


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_open_and_print_nothing(name: str) -> None:
    calls = (node.func for node in ast.walk(tree(name)) if isinstance(node, ast.Call))
    called = {
        call.id if isinstance(call, ast.Name) else call.attr
        for call in calls
        if isinstance(call, (ast.Name, ast.Attribute))
    }
    assert called & {"open", "input", "read_text", "write_text", "read_bytes", "write_bytes", "urlopen"} == set()


API = "comfy_worker.gateway.api"
FORBIDDEN_TO_AN_API = {"comfy_worker.gateway.store.job_store", "comfy_worker.gateway.container", "sqlalchemy"}


def api_of(name: str) -> str:
    """Return the API that a module belongs to; empty for what all of them share."""
    path = name.removeprefix(f"{API}.").split(".")
    return path[0] if f"{API}.{path[0]}.{path[-1]}" == name and len(path) > 1 else ""


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith(f"{API}.")))
def test_an_api_imports_the_service_and_no_other_api(name: str) -> None:
    found = {imported for imported in imports(name) if is_in(imported, FORBIDDEN_TO_AN_API)}
    others = {api_of(imported) for imported in own_imports(name) if imported.startswith(f"{API}.")}
    assert found == set()
    assert others <= {"", api_of(name)}
