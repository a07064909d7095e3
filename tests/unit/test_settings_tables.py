"""The tables of settings in the documentation say what the settings are."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import AliasChoices

from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.settings import Settings, describe

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("kind", "page"), [(Settings, "configuration.md"), (GatewaySettings, "gateway.md")])
def test_a_page_has_the_table_of_its_settings(kind: type[Settings], page: str) -> None:
    table = describe(kind)
    assert table in (DOCS / page).read_text(encoding="utf-8"), f"docs/{page} needs this table:\n{table}"


def test_the_gateways_table_has_each_of_its_own_settings_once() -> None:
    own = [field for name, field in GatewaySettings.model_fields.items() if name not in Settings.model_fields]
    table = describe(GatewaySettings)
    assert len(table.splitlines()) == len(own) + 2
    for field in own:
        assert isinstance(field.validation_alias, AliasChoices)
        assert field.description
        assert field.description.endswith(".")
        assert all(f"`{name}`" in table for name in field.validation_alias.choices)


def test_no_two_settings_of_the_gateway_share_a_name() -> None:
    aliases = [field.validation_alias for field in GatewaySettings.model_fields.values()]
    names = [str(name) for alias in aliases if isinstance(alias, AliasChoices) for name in alias.choices]
    assert len(names) == len(set(names))
