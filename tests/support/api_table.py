"""Every endpoint, field, setting and status code of the five APIs, with the test that proves it: one table.

docs/reference/api.md is this table as a page; it is written by

    python -m tests.support.api_table > docs/reference/api.md
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.support.processes import ROOT

_FOLDER = Path(__file__).parents[1] / "data" / "api_table"
_APIS = {
    "runpod": ("RunPod's API", "gateway.md"),
    "generate": ("The generate API", "api/generate.md"),
    "workflow": ("The workflow API", "api/workflow.md"),
    "task": ("The task API", "api/task.md"),
    "catalog": ("The catalog API", "api/catalog.md"),
}
_KINDS = {
    "endpoint": "Endpoints",
    "field": "Fields",
    "status": "Status codes",
    "setting": "Settings",
    "behaviour": "Behaviour",
}
_INTRODUCTION = """# The five APIs

The gateway serves five APIs over the same jobs: a job that was submitted through one is available through all. This
page lists everything that the APIs' descriptions name, with the test that covers it. It is generated, and a test keeps
it complete. `/docs` of a running gateway shows the format of requests and responses, with examples that run.

RunPod's paths return errors as `{"error", "code", "hint", "details"}`. The generate, workflow and task APIs add
`detail`; the catalog API returns errors in its envelope.

If a node fails, `/result` and `/generate/sync` return 500, because the generate API's description says so of failed
processing. The other APIs return 200 for a known job, and report the failure in the body.
"""


@dataclass(frozen=True)
class Row:
    """One thing that a description names.

    Attributes:
        api: which of the five.
        kind: `endpoint`, `field`, `status`, `setting` or `behaviour`.
        what: its name.
        says: what it does here.
        test: `file` or `file::function`.
    """

    api: str
    kind: str
    what: str
    says: str
    test: str


def rows() -> list[Row]:
    """Return the whole table."""
    return [Row(api=api, **row) for api in _APIS for row in json.loads((_FOLDER / f"{api}.json").read_text())]


def page() -> str:
    """Return the table as Markdown."""
    lines = [_INTRODUCTION]
    for api, (title, link) in _APIS.items():
        lines += [f"## {title}", "", f"Reference: [{link.rpartition('/')[2]}]({link})", ""]
        for kind, heading in _KINDS.items():
            found = [row for row in rows() if (row.api, row.kind) == (api, kind)]
            if found:
                lines += [f"### {heading}", "", "| name | meaning | test |", "| --- | --- | --- |"]
                lines += [f"| {cell(f'`{row.what}`')} | {cell(row.says)} | {proof(row.test)} |" for row in found]
                lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def cell(text: str) -> str:
    """Return a text as it stands in a cell of a table."""
    return text.replace("|", "\\|")


def proof(test: str) -> str:
    """Return a link to a test's file that is named as the test is."""
    file, _, function = test.partition("::")
    function = function.rpartition("::")[2]
    name = function.removeprefix("test_").replace("_", " ") or Path(file).stem
    return f"[{name}](../../{file})"


def is_there(test: str) -> bool:
    """Return whether a test exists: `file`, `file::function` or `file::class::function`."""
    file, _, names = test.partition("::")
    return (ROOT / file).is_file() and set(filter(None, names.split("::"))) <= _names_in(ROOT / file)


@cache
def _names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {
        node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }


if __name__ == "__main__":
    print(page(), end="")
