"""Every endpoint, field, setting and status code of the five APIs, with the test that proves it: one table.

docs/reference/api.md is this table as a page; it is written by

    python -m tests.support.docs.api_table > docs/reference/api.md
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.support.paths import DATA, ROOT

_FOLDER = DATA / "api_table"
_APIS = {
    "all": "All APIs",
    "runpod": "RunPod's API",
    "generate": "The generate API",
    "workflow": "The workflow API",
    "task": "The task API",
    "catalog": "The catalog API",
}
_KINDS = {
    "endpoint": "Endpoints",
    "field": "Fields",
    "status": "Status codes",
    "setting": "Settings",
    "behaviour": "Behaviour",
}
_INTRODUCTION = """# The five APIs

The gateway serves five APIs over the same jobs: a job submitted through one is available through all. This page lists
every endpoint, field, setting and status code; each name links to the test that covers it. It is generated and
complete. `/docs` of a running gateway shows requests and responses, with examples that run.

| API | reference | errors |
| --- | --- | --- |
| RunPod | [gateway.md](gateway.md) | `{"error", "code", "hint", "details"}` |
| generate | [generate.md](api/generate.md) | the same and `detail`; a failed node is a 500 |
| workflow | [workflow.md](api/workflow.md) | the same and `detail` |
| task | [task.md](api/task.md) | the same and `detail` |
| catalog | [catalog.md](api/catalog.md) | an envelope |

A known job that failed is a 200 whose body has the error, except in the generate API.
"""


_EXPLAINED = {
    "field": "Explained in the API's reference, and in [job.md](job.md).",
    "setting": "Explained in [configuration.md](configuration.md) and, for start.sh, [deploy.md](../how-to/deploy.md).",
}
"""Where the kinds are explained that this page only lists."""


@dataclass(frozen=True)
class Row:
    """One thing that a description names.

    Attributes:
        api: one of the five, or `all`.
        kind: `endpoint`, `field`, `status`, `setting` or `behaviour`.
        what: its name.
        test: `file` or `file::function`.
        says: what it does here; of a field or a setting, other pages say that.
    """

    api: str
    kind: str
    what: str
    test: str
    says: str = ""


def rows() -> list[Row]:
    """Return the whole table."""
    return [Row(api=api, **row) for api in _APIS for row in json.loads((_FOLDER / f"{api}.json").read_text())]


def page() -> str:
    """Return the table as Markdown."""
    lines = [_INTRODUCTION]
    for api, title in _APIS.items():
        lines += [f"## {title}", ""]
        for kind, heading in _KINDS.items():
            found = [row for row in rows() if (row.api, row.kind) == (api, kind)]
            if found:
                lines += [f"### {heading}", "", *(_list(found, kind) if kind in _EXPLAINED else _table(found)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(found: Sequence[Row]) -> list[str]:
    names = [link_to_test(f"`{cell(row.what)}`", row.test) for row in found]
    meanings = [cell(row.says) for row in found]
    return ["| name | meaning |", "| --- | --- |", *map("| {} | {} |".format, names, meanings)]


def _list(found: Sequence[Row], kind: str) -> list[str]:
    names = [link_to_test(f"`{row.what}`", row.test) for row in found]
    return [_EXPLAINED[kind], "", *map("- {}".format, names)]


def cell(text: str) -> str:
    """Return a text as it stands in a cell of a table."""
    return text.replace("|", "\\|")


def link_to_test(text: str, test: str) -> str:
    """Return a link to a test's file, with the test's name as its title."""
    file, _, name = test.partition("::")
    title = f' "{name}"' if name else ""
    return f"[{text}](../../{file}{title})"


def is_existing_test(test: str) -> bool:
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
