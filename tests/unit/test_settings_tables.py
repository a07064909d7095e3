"""The tables of settings in the documentation say what the settings are."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import AliasChoices

from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.settings import Settings, describe

PAGE = Path(__file__).parents[2] / "docs/reference/configuration.md"


@pytest.mark.parametrize("kind", [Settings, GatewaySettings])
def test_the_reference_has_the_table_of_the_settings(kind: type[Settings]) -> None:
    table = describe(kind)
    assert table in PAGE.read_text(encoding="utf-8"), f"{PAGE} needs this table:\n{table}"


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
