"""docker-compose.yml, as far as it can be judged without Docker: schema, profiles, what it tells our services."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from comfy_worker.gateway.settings import load_gateway_settings
from tests.support.docs import compose_file
from tests.support.docs.compose_file import OWN_IMAGE, PROFILES
from tests.support.paths import ROOT

ONE_SHOT = {"bucket"}
"""Services that do something and end."""
SECRET = re.compile(r"PASSWORD|SECRET|KEY|TOKEN|AUTH")


@pytest.fixture(scope="module")
def complete() -> dict[str, Any]:
    return compose_file.complete()


def own_services(file: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: one for name, one in file["services"].items() if one["image"].startswith(OWN_IMAGE)}


class TestVariables:
    def test_the_example_has_exactly_the_variables(self) -> None:
        used = {name for name, _, _ in compose_file.variables()} | {
            secret["environment"] for secret in compose_file.raw()["secrets"].values()
        }
        assert used == compose_file.needed() | set(compose_file.optional())
        assert not compose_file.needed() & set(compose_file.optional())

    def test_variables_without_default_are_required(self) -> None:
        for name, operator, _ in compose_file.variables():
            assert operator == (":?" if name in compose_file.needed() else ":-"), name

    @pytest.mark.parametrize("name", sorted(compose_file.needed()))
    def test_a_missing_variable_is_named(self, name: str) -> None:
        others = dict.fromkeys(compose_file.needed() - {name}, "x")
        with pytest.raises(compose_file.MissingVariable, match=name):
            compose_file.read(others)

    def test_defaults_are_the_same_everywhere(self) -> None:
        defaults = compose_file.optional()
        for name, operator, word in compose_file.variables():
            if operator == ":-" and "${" not in word:
                assert word == defaults[name], name

    def test_the_file_contains_no_secret(self) -> None:
        for service in compose_file.raw()["services"].values():
            for name, value in service.get("environment", {}).items():
                if SECRET.search(name) and name != "BUCKET_ACCESS_KEY_ID":
                    assert re.search(r"\$\{[A-Z0-9_]+:\?", value), name
                    assert not re.search(r"\$\{[A-Z0-9_]*(?:PASSWORD|SECRET|KEY)[A-Z0-9_]*:-", value), name

    def test_our_services_get_only_settings(self, complete: dict[str, Any]) -> None:
        settings = compose_file.setting_names()
        for name, service in own_services(complete).items():
            assert set(service["environment"]) - settings == set(), name

    @pytest.mark.parametrize("name", sorted(own_services(compose_file.complete())))
    def test_our_services_accept_their_settings(
        self, complete: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for variable in compose_file.setting_names():
            monkeypatch.delenv(variable, raising=False)
        for variable, value in complete["services"][name]["environment"].items():
            monkeypatch.setenv(variable, value)
        settings = load_gateway_settings()
        assert settings.has_bucket is (settings.engine == "celery")

    def test_fleet_services_share_their_settings(self, complete: dict[str, Any]) -> None:
        services = complete["services"]
        for name in ("ENGINE", "REDIS_URL", "DATABASE_URL", "GATEWAY_KEY", "BUCKET_ENDPOINT_URL", "BUCKET_NAME"):
            assert len({services[one]["environment"][name] for one in ("gateway", "worker", "worker-demo")}) == 1
        assert services["gateway"]["environment"]["REDIS_URL"] == services["flower"]["environment"]["CELERY_BROKER_URL"]
        assert (
            services["bucket"]["environment"].items()
            <= {
                **services["minio"]["environment"],
                **services["worker"]["environment"],
            }.items()
        )

    def test_fleet_services_share_a_folder(self, complete: dict[str, Any]) -> None:
        for name in ("gateway", "worker", "worker-demo"):
            service = complete["services"][name]
            assert f"fleet-data:{service['environment']['DATA_DIR']}" in service["volumes"]

    def test_the_gateway_reaches_a_comfyui(self, complete: dict[str, Any]) -> None:
        services = complete["services"]
        for name in ("worker", "worker-demo"):
            (alias,) = services[name]["networks"]["default"]["aliases"]
            assert services["gateway"]["environment"]["COMFYUI_URL"] == f"http://{alias}:8188"
            assert services[name]["environment"]["COMFYUI_LISTEN"] == "0.0.0.0"

    def test_minio_has_the_host_name_in_its_links(self) -> None:
        environment = dict.fromkeys(compose_file.needed(), "x") | {"S3_HOST": "s3.example.com"}
        services = compose_file.read(environment)["services"]
        assert services["minio"]["networks"]["default"]["aliases"] == ["s3.example.com"]
        assert services["worker"]["environment"]["BUCKET_ENDPOINT_URL"] == "http://s3.example.com:9000"


class TestServices:
    @pytest.mark.parametrize("name", sorted(compose_file.raw()["services"]))
    def test_each_has_limits(self, complete: dict[str, Any], name: str) -> None:
        service = complete["services"][name]
        assert set(service["profiles"]) <= set(PROFILES)
        assert service["restart"] == ("on-failure:5" if name in ONE_SHOT else "unless-stopped")
        assert service["logging"]["options"]["max-size"]
        resources = service["deploy"]["resources"]
        if "limits" in resources:
            assert set(resources["limits"]) == {"cpus", "memory"}
        else:
            (device,) = resources["reservations"]["devices"]
            assert device["driver"] == "nvidia"
            assert device["capabilities"] == ["gpu"]

    @pytest.mark.parametrize("name", sorted(compose_file.raw()["services"]))
    def test_each_has_a_health_check(self, complete: dict[str, Any], name: str) -> None:
        service = complete["services"][name]
        is_own = service["image"].startswith(OWN_IMAGE)
        assert ("healthcheck" in service) is not (is_own or name in ONE_SHOT)  # the image has one
        assert "HEALTHCHECK" in (ROOT / "Dockerfile").read_text()

    def test_third_party_images_are_pinned(self, complete: dict[str, Any]) -> None:
        for name, service in complete["services"].items():
            _, _, tag = service["image"].rpartition(":")
            if name not in own_services(complete):
                assert re.fullmatch(r"v?\d+\.\d+\.?\d*(-alpine)?|RELEASE\.[\dTZ-]+", tag), service["image"]
                assert "build" not in service

    def test_our_image_uses_existing_targets_and_arguments(self, complete: dict[str, Any]) -> None:
        dockerfile = (ROOT / "Dockerfile").read_text()
        project = (ROOT / "pyproject.toml").read_text()
        for service in own_services(complete).values():
            for argument in service["build"]["args"]:
                assert f"\nARG {argument}" in dockerfile
            for extra in service["build"]["args"]["WORKER_EXTRAS"].split(","):
                assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra

    def test_every_volume_is_defined_and_used(self, complete: dict[str, Any]) -> None:
        mounted = [mount.split(":")[0] for one in complete["services"].values() for mount in one.get("volumes", [])]
        for source in mounted:
            assert not source.startswith("./") or (ROOT / source).exists()
        assert {source for source in mounted if not source.startswith("./")} == set(complete["volumes"])

    def test_workers_share_the_gpus_of_their_machine(self, complete: dict[str, Any]) -> None:
        worker = complete["services"]["worker"]
        locks = worker["environment"]["GPU_LOCK_DIR"]
        assert any(mount.endswith(f":{locks}") for mount in worker["volumes"])
        assert worker["deploy"]["resources"]["reservations"]["devices"][0]["count"] == "all"
        assert "container_name" not in worker  # --scale would not work
        assert "ports" not in worker


@pytest.mark.parametrize("profile", PROFILES)
class TestProfiles:
    def test_includes_its_services_dependencies(self, complete: dict[str, Any], profile: str) -> None:
        services = compose_file.services(complete, profile)
        assert services
        for name, service in services.items():
            for other, wait in service.get("depends_on", {}).items():
                assert other in services or wait.get("required") is False, f"{name} waits for {other}"
                awaited = complete["services"][other]
                assert wait["condition"] == (
                    "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
                )
                assert other in ONE_SHOT or "healthcheck" in awaited or awaited["image"].startswith(OWN_IMAGE)

    def test_has_no_circular_dependencies(self, complete: dict[str, Any], profile: str) -> None:
        waits = {name: set(one.get("depends_on", {})) for name, one in compose_file.services(complete, profile).items()}
        while waits:
            free = {name for name, others in waits.items() if not others & waits.keys()}
            assert free, waits
            waits = {name: others for name, others in waits.items() if name not in free}

    def test_publishes_no_port_twice(self, complete: dict[str, Any], profile: str) -> None:
        mappings = [port for one in compose_file.services(complete, profile).values() for port in one.get("ports", [])]
        published = [mapping.split(":")[1] for mapping in mappings]
        assert [port for port, times in Counter(published).items() if times > 1] == []
        assert all(mapping.startswith("127.0.0.1:") for mapping in mappings)

    def test_is_explained(self, complete: dict[str, Any], profile: str) -> None:
        page = (ROOT / "docs/how-to/compose.md").read_text()
        assert f"--profile {profile} up" in page
        for name in compose_file.services(complete, profile):
            assert f"`{name}`" in page
