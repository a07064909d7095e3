"""Who may use the gateway: keys, pages of other origins, links, rates and sizes."""

from __future__ import annotations

import base64
import hashlib
import stat
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.api_keys import Authenticator, Keys, is_loopback, read_hashes, split_name, stored_secret
from comfy_worker.gateway.errors import Unauthorized
from comfy_worker.gateway.http.limits import RUN_LIMIT, RUNSYNC_LIMIT, body_limit
from comfy_worker.gateway.jobs.signed_links import AssetLinks

KEY = "the key"


def basic(password: str) -> str:
    return f"Basic {base64.b64encode(f'me:{password}'.encode()).decode()}"


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", KEY, basic(KEY)])
def test_every_form_of_key_is_accepted(header: str) -> None:
    assert Keys([KEY]).check(header) == Keys([], [hashlib.sha256(KEY.encode()).hexdigest()]).check(header)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic !", basic("wrong"), "\udcff"])
def test_anything_else_is_rejected(header: str | None) -> None:
    with pytest.raises(Unauthorized):
        Keys([KEY, "another"]).check(header)


def test_a_keys_name_does_not_reveal_it() -> None:
    assert KEY not in Keys([KEY]).check(KEY).name
    assert Keys([KEY, "b"]).check(KEY) != Keys([KEY, "b"]).check("b")


def test_an_unnamed_key_has_a_stable_name() -> None:
    name = f"key-{hashlib.sha256(KEY.encode()).hexdigest()[:12]}"
    assert Keys([KEY]).check(KEY).owner == Keys(["other:b", KEY]).check(KEY).owner == name


@pytest.mark.parametrize(
    ("text", "name", "key"),
    [
        ("alice:s3cret", "alice", "s3cret"),
        ("alice=s3cret", "alice", "s3cret"),
        ("alice@example.com: s3cret", "alice@example.com", "s3cret"),
        ("alice:with:more=of both", "alice", "with:more=of both"),
        ("s3cret", "", "s3cret"),
        # Keys in base64.
        ("c2VjcmV0Cg=", "", "c2VjcmV0Cg="),
        ("c2VjcmV0Cg==", "", "c2VjcmV0Cg=="),
        ("alice:c2VjcmV0Cg==", "alice", "c2VjcmV0Cg=="),
        ("a name with spaces:s3cret", "", "a name with spaces:s3cret"),
    ],
)
def test_a_name_is_split_from_its_key(text: str, name: str, key: str) -> None:
    assert split_name(text) == (name, key)
    found = Keys([text]).check(f"Bearer {key}").name
    assert found == name if name else found.startswith("key-")


def test_a_caller_sees_what_its_name_owns() -> None:
    keys = Keys(["alice:old", "alice:new", "bob:b"], admins=["root:r"])
    assert keys.check("old") == keys.check("new")
    seen = {
        caller: [owner for owner in ("alice", "bob", "root", "") if keys.check(caller).sees(owner)] for caller in "br"
    }
    assert seen == {"b": ["bob"], "r": ["alice", "bob", "root", ""]}
    assert keys.check("new").sees("alice")
    assert not keys.check("new").sees("bob")


def test_a_key_that_is_given_a_name_keeps_its_jobs() -> None:
    before = Keys([KEY, "b"]).check(KEY).owner
    named = Keys([f"alice:{KEY}", "b"])
    assert named.check(KEY).sees(before)
    assert not named.check("b").sees(before)


def test_unowned_jobs_belong_to_a_single_key() -> None:
    assert Keys(["alice:old", "alice:new"], admins=["r"]).check("new").sees("")
    assert not Keys(["alice:a", "bob:b"]).check("a").sees("")
    assert Keys([]).check(None).sees("anybody's")


@pytest.mark.parametrize(
    ("keys", "admins"), [(["alice:k", "bob:k"], []), (["alice:k", "k"], []), (["k"], ["k"]), (["k"], ["root:k"])]
)
def test_a_key_with_two_names_is_rejected_without_being_shown(keys: list[str], admins: list[str]) -> None:
    with pytest.raises(InvalidInput, match="is also that of") as refused:
        Keys(keys, [], admins)
    assert "'k'" not in refused.value.message


@pytest.mark.parametrize(
    ("method", "headers", "is_admitted"),
    [
        ("POST", {"authorization": f"Bearer {KEY}", "origin": "https://elsewhere", "host": "pod"}, True),
        ("GET", {"authorization": basic(KEY), "host": "pod"}, True),
        ("GET", {"authorization": basic(KEY), "origin": "https://pod", "host": "pod"}, True),
        ("GET", {"authorization": basic(KEY), "origin": "https://ours", "host": "pod"}, True),
        ("GET", {"authorization": basic(KEY), "origin": "https://elsewhere", "host": "pod"}, False),
        ("POST", {"authorization": basic(KEY), "host": "pod"}, False),
    ],
)
def test_foreign_pages_cannot_use_browser_credentials(method: str, headers: dict[str, str], is_admitted: bool) -> None:
    assert admits(Authenticator(Keys([KEY]), ["https://ours"]), method, headers) is is_admitted


@pytest.mark.parametrize(
    ("headers", "is_admitted"),
    [
        ({"host": "127.0.0.1:8000"}, True),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, True),
        ({"host": "[::1]:8000"}, True),
        ({"host": "127.0.0.1:8000", "origin": "https://elsewhere"}, False),
        ({"host": "rebound.example:8000"}, False),
        ({}, False),
    ],
)
def test_cross_site_requests_are_rejected_without_keys(headers: dict[str, str], is_admitted: bool) -> None:
    assert admits(Authenticator(Keys([]), []), "POST", headers) is is_admitted


def admits(authenticator: Authenticator, method: str, headers: dict[str, str]) -> bool:
    try:
        authenticator.authenticate(method, Headers(headers))
    except Unauthorized:
        return False
    return True


def test_a_secret_is_generated_once_and_readable_only_by_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "data" / "api.key"
    secret = stored_secret(file)
    assert stored_secret(file) == secret
    assert len(secret) >= 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_partially_written_secret_is_regenerated(tmp_path: Path) -> None:
    file = tmp_path / "api.key"
    file.touch()
    assert stored_secret(file) == stored_secret(file) != ""


def test_a_hash_file_has_the_format_of_sha256sum(tmp_path: Path) -> None:
    file = tmp_path / "hashes"
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    file.write_text(f"# ours\n{digest.upper()}  -\n\n{digest}\n{digest}  keys/alice # hers\n{digest} *bob")
    assert read_hashes(str(file)) == [digest, digest, f"alice:{digest}", f"bob:{digest}"]
    assert Keys([], [f"alice:{digest}"]).check(KEY).name == "alice"


@pytest.mark.parametrize("text", ["", "# nothing\n", "the key itself\n", f"{'0' * 64}  two words\n"])
def test_a_file_without_hashes_or_names_is_rejected(tmp_path: Path, text: str) -> None:
    file = tmp_path / "hashes"
    file.write_text(text)
    with pytest.raises(InvalidInput):
        read_hashes(str(file))


def test_a_missing_file_is_rejected_without_its_path(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as refused:
        read_hashes(str(tmp_path / "none"))
    assert str(tmp_path) not in refused.value.message


@pytest.mark.parametrize(
    ("host", "is_one"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("pod", False)],
)
def test_loopback_addresses_are_recognised(host: str, is_one: bool) -> None:
    assert is_loopback(host) is is_one


def parts_of(url: str) -> tuple[int, str]:
    query = dict(part.split("=") for part in url.partition("?")[2].split("&"))
    return int(query["expires"]), query["signature"]


def test_a_link_works_only_for_its_file() -> None:
    links = AssetLinks("secret", 60)
    url = links.url("http://gateway/", "job/a b.png")
    assert url.startswith("http://gateway/assets/job/a%20b.png?")
    expires, signature = parts_of(url)
    links.check("job/a b.png", expires, signature)
    for path, when, given in (("job/b.png", expires, signature), ("job/a b.png", expires + 1, signature)):
        with pytest.raises(Unauthorized, match="signature"):
            links.check(path, when, given)
    with pytest.raises(Unauthorized, match="signature"):
        AssetLinks("other", 60).check("job/a b.png", expires, signature)


def test_a_link_expires() -> None:
    links = AssetLinks("secret", -1)
    with pytest.raises(Unauthorized, match="expired"):
        links.check("job/a.png", *parts_of(links.url("http://gateway", "job/a.png")))


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/run", RUN_LIMIT),
        ("/v2/mine/run", RUN_LIMIT),
        ("/runsync", RUNSYNC_LIMIT),
        ("/v2/run/runsync", RUNSYNC_LIMIT),
        ("/status/x", 1_000_000),
        ("/", 1_000_000),
    ],
)
def test_body_limits_follow_runpods(path: str, limit: int) -> None:
    assert body_limit(path) == limit
