"""The tables of settings in the documentation say what the settings are."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.settings import Settings, list_settings

PAGE = Path(__file__).parents[2] / "docs/reference/configuration.md"


def table_of(kind: type[Settings]) -> str:
    """Return these settings as a Markdown table."""
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for setting in list_settings(kind):
        default = f"`{setting.default}`" if setting.default else "not set"
        others = ", ".join(f"`{name}`" for name in setting.variables[1:])
        also = f" Also read from {others}." if others else ""
        rows.append(f"| `{setting.variables[0]}` | {default} | {setting.description}{also} |")
    return "\n".join(rows)


@pytest.mark.parametrize("kind", [Settings, GatewaySettings])
def test_the_reference_has_the_table_of_the_settings(kind: type[Settings]) -> None:
    table = table_of(kind)
    assert table in PAGE.read_text(encoding="utf-8"), f"{PAGE} needs this table:\n{table}"


@pytest.mark.parametrize("kind", [Settings, GatewaySettings])
def test_every_setting_has_a_default_and_a_sentence_and_shares_no_name(kind: type[Settings]) -> None:
    settings = [*list_settings(Settings), *list_settings(kind)] if kind is not Settings else [*list_settings(kind)]
    assert len(settings) == len(kind.model_fields)
    assert not any(field.is_required() for field in kind.model_fields.values())
    assert all(setting.description.endswith(".") for setting in settings)
    names = [name for setting in settings for name in setting.variables]
    assert names == [name.upper() for name in names]
    assert len(names) == len(set(names))
