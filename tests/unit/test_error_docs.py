"""The tables of error codes in the documentation have the codes that exist, and no others."""

from __future__ import annotations

import re
from importlib import import_module

from comfy_worker.errors import all_errors
from tests.support.paths import ROOT

MODULES = ("comfy_worker.gateway.errors", "comfy_worker.gateway.modifiers.errors")
"""Those with errors beside comfy_worker.errors."""
OF_HTTP = {"method_not_allowed", "range_not_satisfiable"}
"""Statuses of Starlette's own."""


def codes_in(page: str, heading: str) -> set[str]:
    section = re.split(rf"^##+ {heading}$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    table = re.split(r"^##", section, maxsplit=1, flags=re.MULTILINE)[0]
    cells = re.findall(r"^\| (?:\d{3} \| )?(`[^|]+`) \|", table, re.MULTILINE)
    return set(re.findall(r"`(\w+)`", " ".join(cells)))


def test_every_code_is_documented_and_every_documented_code_exists() -> None:
    for module in MODULES:
        import_module(module)
    documented = codes_in("docs/reference/job.md", "Error codes") | codes_in("docs/reference/gateway.md", "Errors")
    assert documented == {error.code for error in all_errors()} | OF_HTTP
