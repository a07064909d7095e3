"""Fetching from HTTP servers: redirects, retries, TLS, cancellation, and what the cache keeps."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from comfy_worker.errors import Cancelled, InputFetchFailed
from comfy_worker.net.fetcher import Fetcher
from comfy_worker.settings import Settings, load_settings
from comfy_worker.stop import Stop
from tests.support.network.fake_internet import FakeInternet
from tests.support.network.file_server import FileServer, RawAnswer, ServedFile, file_server
from tests.support.network.ports import closed_port
from tests.support.waiting import TIMEOUT_S

CONTENT = bytes(range(256)) * 300


OTHER = b"something else"


@pytest.fixture(autouse=True)
def bare_environment(environment: pytest.MonkeyPatch) -> None:
    """Take the settings of this machine away."""


@pytest.fixture(scope="module")
def running() -> Iterator[FileServer]:
    with file_server() as server:
        yield server


@pytest.fixture
def server(running: FileServer) -> FileServer:
    running.requests.clear()
    running.bodies.clear()
    return running


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def settings(cache_dir: Path) -> Settings:
    return load_settings(allow_private_urls=True, input_cache_dir=str(cache_dir), input_max_mb=64)


def changed(settings: Settings, **fields: Any) -> Settings:
    return settings.model_copy(update=fields)


def fetch(url: str, settings: Settings) -> bytes:
    with Fetcher(settings).fetch(url, Stop()) as file:
        return file.read()


def bodies(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.body"))


def test_fetched_content_is_complete(server: FileServer, settings: Settings) -> None:
    assert fetch(server.put("/a.bin", CONTENT), settings) == CONTENT
    assert fetch(server.put("/b.bin", OTHER), changed(settings, input_cache_mb=0)) == OTHER


def test_redirects_are_followed(server: FileServer, settings: Settings) -> None:
    server.put("/target.bin", CONTENT)
    server.put("/hop", ServedFile(status=307, headers={"Location": "../target.bin"}, has_etag=False))
    url = server.put("/start", ServedFile(status=302, headers={"Location": f"{server.url}/hop"}, has_etag=False))
    assert fetch(url, settings) == CONTENT


def test_credentials_in_a_url_are_for_its_own_host(server: FileServer, settings: Settings) -> None:
    other = server.put("/other.bin", CONTENT).replace("127.0.0.1", "localhost")
    server.put("/login.bin", ServedFile(status=302, headers={"Location": other}, has_etag=False))
    assert fetch(server.url.replace("://", "://user:pass@") + "/login.bin", settings) == CONTENT
    assert server.headers["/login.bin"]["Authorization"] == "Basic dXNlcjpwYXNz"
    assert "Authorization" not in server.headers["/other.bin"]


def test_a_netrc_file_is_not_used_for_callers_urls(
    server: FileServer, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("default login us password ours")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fetch(server.put("/netrc.bin", CONTENT), settings)
    assert "Authorization" not in server.headers["/netrc.bin"]


def test_compressed_responses_are_decompressed(server: FileServer, settings: Settings) -> None:
    packed = gzip.compress(CONTENT[:1000]) + gzip.compress(CONTENT[1000:])
    url = server.put("/packed.bin", ServedFile(packed, {"Content-Encoding": "gzip"}))
    assert fetch(url, settings) == CONTENT


def test_transient_errors_are_retried(server: FileServer, settings: Settings) -> None:
    url = server.put("/shy.bin", ServedFile(CONTENT, failures=2))
    assert fetch(url, settings) == CONTENT
    assert server.requests["/shy.bin"] == 3


def test_permanent_errors_are_not_retried(server: FileServer, settings: Settings) -> None:
    with pytest.raises(InputFetchFailed, match="404 Not Found"):
        fetch(f"{server.url}/nothing.bin", settings)
    assert server.requests["/nothing.bin"] == 1


def test_connection_refused(settings: Settings) -> None:
    with closed_port() as port, pytest.raises(InputFetchFailed, match="its server refused the connection"):
        fetch(f"http://127.0.0.1:{port}/a.bin", settings)


def test_one_of_several_addresses_is_enough(
    server: FileServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("/several.bin", CONTENT)
    internet = FakeInternet({"several.example": ["8.8.4.4", "8.8.8.8"]}, {"8.8.8.8": server.port})
    internet.install(monkeypatch)
    assert fetch("http://several.example/several.bin", settings) == CONTENT
    assert internet.reached == ["8.8.4.4", "8.8.8.8"]


def test_a_server_without_tls(server: FileServer, settings: Settings) -> None:
    url = server.put("/plain.bin", CONTENT).replace("http:", "https:")
    with pytest.raises(InputFetchFailed, match="no TLS connection could be made to its server"):
        fetch(url, settings)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a certificate for secure.example that nobody has signed, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "secure.example")])
    now = datetime.now(timezone.utc)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("secure.example")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("certificate") / "secure.pem"
    encoding, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, no_password)
    path.write_bytes(private + signed.public_bytes(encoding))
    return path


@pytest.mark.parametrize(
    ("host", "trusted", "sentence"),
    [
        ("secure.example", True, None),
        ("secure.example", False, "its TLS certificate was not accepted: self-signed certificate"),
        ("other.example", True, "its TLS certificate was not accepted: Hostname mismatch"),
    ],
)
def test_tls_is_checked_against_the_name_though_the_address_is_pinned(
    environment: pytest.MonkeyPatch,
    certificate: Path,
    settings: Settings,
    host: str,
    trusted: bool,
    sentence: str | None,
) -> None:
    if trusted:
        environment.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with file_server(certificate) as server:
        server.put("/a.bin", CONTENT)
        FakeInternet({host: ["8.8.8.8"]}, {"8.8.8.8": server.port}).install(environment)
        if sentence is None:
            assert fetch(f"https://{host}/a.bin", settings) == CONTENT
            return
        with pytest.raises(InputFetchFailed) as failed:
            fetch(f"https://{host}/a.bin", settings)
    assert failed.value.message.startswith(f"https://{host}/a.bin could not be fetched: {sentence}")


def test_a_large_file_is_streamed(server: FileServer, settings: Settings) -> None:
    small, large = server.put("/small.bin", CONTENT), server.put("/large.bin", bytes(32 << 20))
    fetch(small, settings)  # what is loaded for the first fetch is no part of the measure
    tracemalloc.start()
    try:
        file = Fetcher(settings).fetch(large, Stop())
        mine = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*comfy_worker*", all_frames=True)])
    finally:
        tracemalloc.stop()
    with file:
        assert file.seek(0, 2) == 32 << 20
    assert sum(trace.size for trace in mine.traces) < 4 << 20


def test_a_cancelled_fetch_ends_at_once(server: FileServer, settings: Settings) -> None:
    url = server.put("/silent.bin", RawAnswer(b"HTTP/1.1 200 OK\r\n", closes=False))
    stop = Stop()
    with ThreadPoolExecutor(1) as threads:
        fetching = threads.submit(Fetcher(settings).fetch, url, stop)
        while not server.requests["/silent.bin"]:
            assert server.at_work.acquire(timeout=TIMEOUT_S)
        stop.set()
        with pytest.raises(Cancelled):
            fetching.result(TIMEOUT_S)


def test_waiting_for_another_fetch_has_the_same_timeout(server: FileServer, settings: Settings) -> None:
    url = server.put("/slow.bin", RawAnswer(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", closes=False))
    stop = Stop()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(Fetcher(settings).fetch, url, stop)
        while not server.requests["/slow.bin"]:
            assert server.at_work.acquire(timeout=TIMEOUT_S)
        with pytest.raises(InputFetchFailed, match=r"it took longer than 0\.2 seconds"):
            fetch(url, changed(settings, input_fetch_timeout_s=0.2))
        stop.set()
        with pytest.raises(Cancelled):
            first.result(TIMEOUT_S)


def test_a_full_disk_is_reported(server: FileServer, cache_dir: Path) -> None:
    url = server.put("/too much.bin", bytes(4 << 20)).replace(" ", "%20")
    script = (
        "import resource, sys\n"
        "from comfy_worker.errors import DiskFull\n"
        "from comfy_worker.net.fetcher import Fetcher\n"
        "from comfy_worker.settings import load_settings\n"
        "from comfy_worker.stop import Stop\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n"
        "    Fetcher(load_settings()).fetch(sys.argv[1], Stop())\n"
        "except DiskFull as error:\n"
        "    print(error.message)\n"
    )
    environment = {
        **os.environ,
        "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true",
        "INPUT_CACHE_DIR": str(cache_dir),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, url], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.stdout.strip() == f"The worker's disk has no room for {url}", done.stderr
    assert [path.suffix for path in cache_dir.iterdir()] == []


def test_the_same_url_is_fetched_once(server: FileServer, settings: Settings) -> None:
    url = server.put("/kept.bin", CONTENT)
    assert [fetch(url, settings) for _ in range(3)] == [CONTENT] * 3
    assert (server.requests["/kept.bin"], server.bodies["/kept.bin"]) == (3, 1)


def test_a_url_with_another_query_is_another(server: FileServer, settings: Settings) -> None:
    url = server.put("/query.bin", CONTENT)
    assert fetch(f"{url}?a", settings) == fetch(f"{url}?b", settings) == CONTENT
    assert server.bodies["/query.bin"] == 2


def test_changed_files_are_fetched_again(server: FileServer, settings: Settings) -> None:
    url = server.put("/changing.bin", CONTENT)
    assert fetch(url, settings) == CONTENT
    server.put("/changing.bin", OTHER)
    assert fetch(url, settings) == OTHER
    assert fetch(url, settings) == OTHER
    assert server.bodies["/changing.bin"] == 2


def test_a_date_is_used_without_an_etag(server: FileServer, settings: Settings) -> None:
    dated = ServedFile(CONTENT, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}, has_etag=False)
    url = server.put("/dated.bin", dated)
    assert fetch(url, settings) == fetch(url, settings) == CONTENT
    assert server.bodies["/dated.bin"] == 1


@pytest.mark.parametrize(
    "answer",
    [ServedFile(CONTENT, has_etag=False), ServedFile(CONTENT, {"Cache-Control": "private, No-Store"})],
    ids=["nothing to ask by", "no-store"],
)
def test_uncacheable_files_are_not_cached(
    server: FileServer, settings: Settings, cache_dir: Path, answer: ServedFile
) -> None:
    url = server.put("/unkept.bin", answer)
    assert fetch(url, settings) == fetch(url, settings) == CONTENT
    assert server.bodies["/unkept.bin"] == 2
    assert bodies(cache_dir) == []


def test_nothing_is_kept_without_a_cache(server: FileServer, settings: Settings, cache_dir: Path) -> None:
    url = server.put("/off.bin", CONTENT)
    off = changed(settings, input_cache_mb=0)
    assert fetch(url, off) == fetch(url, off) == CONTENT
    assert server.bodies["/off.bin"] == 2
    assert not cache_dir.exists()


def test_a_failing_server_does_not_invalidate_the_cache(server: FileServer, settings: Settings) -> None:
    url = server.put("/failing.bin", CONTENT)
    fetch(url, settings)
    server.put("/failing.bin", ServedFile(status=404, has_etag=False))
    with pytest.raises(InputFetchFailed, match="404"):
        fetch(url, settings)
    server.put("/failing.bin", CONTENT)
    assert fetch(url, settings) == CONTENT
    assert server.bodies["/failing.bin"] == 2, "the 404 is one"


def _truncate(body: Path, metadata: Path) -> None:
    os.truncate(body, 10)


def _lose_body(body: Path, metadata: Path) -> None:
    body.unlink()


def _lose_metadata(body: Path, metadata: Path) -> None:
    metadata.unlink()


def _garble_metadata(body: Path, metadata: Path) -> None:
    metadata.write_bytes(b"\xff{")


def _empty_metadata(body: Path, metadata: Path) -> None:
    metadata.write_text("")


def _foreign_metadata(body: Path, metadata: Path) -> None:
    metadata.write_text(json.dumps(["something", "else"]))


def _leave_part(body: Path, metadata: Path) -> None:
    body.with_suffix(".part").write_bytes(b"begun by a process that was killed")
    metadata.unlink()


@pytest.mark.parametrize(
    "harm",
    [
        _truncate,
        _lose_body,
        _lose_metadata,
        _garble_metadata,
        _empty_metadata,
        _foreign_metadata,
        _leave_part,
    ],
)
def test_a_broken_entry_heals_itself(server: FileServer, settings: Settings, cache_dir: Path, harm: Any) -> None:
    url = server.put("/healing.bin", CONTENT)
    fetch(url, settings)
    [body] = bodies(cache_dir)
    harm(body, body.with_suffix(".json"))

    assert fetch(url, settings) == CONTENT
    assert fetch(url, settings) == CONTENT
    assert server.bodies["/healing.bin"] == 2
    assert sorted(path.suffix for path in cache_dir.iterdir()) == [".body", ".json", ".lock"]


def test_the_least_recently_used_goes_first(server: FileServer, settings: Settings, cache_dir: Path) -> None:
    limited = changed(settings, input_cache_mb=2.5)
    content = bytes(1 << 20)
    urls = [server.put(f"/{name}.bin", content) for name in "abc"]
    for number, url in enumerate([urls[0], urls[1], urls[0], urls[2]]):
        fetch(url, limited)
        newest = max(bodies(cache_dir), key=lambda body: body.stat().st_mtime_ns)
        # Far enough apart for any file system's clock.
        os.utime(newest, (number * 1000, number * 1000))
    server.bodies.clear()
    for url in (urls[0], urls[2]):
        fetch(url, limited)
    assert not server.bodies
    fetch(urls[1], limited)
    assert server.bodies["/b.bin"] == 1
    assert sum(body.stat().st_size for body in bodies(cache_dir)) <= 2.5 * (1 << 20)


def test_an_oversized_file_does_not_evict_others(server: FileServer, settings: Settings, cache_dir: Path) -> None:
    limited = changed(settings, input_cache_mb=2.5)
    small, large = server.put("/fits.bin", CONTENT), server.put("/huge.bin", bytes(3 << 20))
    fetch(small, limited)
    assert fetch(large, limited) == bytes(3 << 20)
    assert [body.stat().st_size for body in bodies(cache_dir)] == [len(CONTENT)]


def test_a_file_in_use_survives_its_eviction(server: FileServer, settings: Settings, cache_dir: Path) -> None:
    limited = changed(settings, input_cache_mb=1)
    with Fetcher(limited).fetch(server.put("/used.bin", CONTENT), Stop()) as used:
        fetch(server.put("/next.bin", bytes(1 << 20)), limited)
        assert [body.stat().st_size for body in bodies(cache_dir)] == [1 << 20]
        assert used.read() == CONTENT


def test_many_threads_fetch_a_file_once(server: FileServer, settings: Settings) -> None:
    url = server.put("/threads.bin", ServedFile(CONTENT, bytes_per_s=len(CONTENT) / 0.3))
    with ThreadPoolExecutor(12) as threads:
        fetched = list(threads.map(lambda _number: fetch(url, settings), range(12)))
    assert fetched == [CONTENT] * 12
    assert (server.requests["/threads.bin"], server.bodies["/threads.bin"]) == (12, 1)


def test_concurrent_fetches_are_all_cached(server: FileServer, settings: Settings, cache_dir: Path) -> None:
    urls = [server.put(f"/crowd/{number}.bin", bytes([number]) * 1000) for number in range(40)]
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(lambda url: fetch(url, settings), urls))
        assert len(bodies(cache_dir)) == 40
        server.bodies.clear()
        assert list(threads.map(lambda url: fetch(url, settings)[0], urls)) == list(range(40))
    assert not server.bodies


FETCH = (
    "import hashlib, sys\n"
    "from comfy_worker.net.fetcher import Fetcher\n"
    "from comfy_worker.settings import load_settings\n"
    "from comfy_worker.stop import Stop\n"
    "print('ready', flush=True)\n"
    "sys.stdin.readline()\n"
    "with Fetcher(load_settings()).fetch(sys.argv[1], Stop()) as file:\n"
    "    print(len(file.read()))\n"
)


def start_fetching(url: str, cache_dir: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "true", "INPUT_CACHE_DIR": str(cache_dir)}
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, url], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_many_processes_fetch_a_file_once(server: FileServer, cache_dir: Path) -> None:
    url = server.put("/processes.bin", ServedFile(CONTENT, bytes_per_s=len(CONTENT) / 0.5))
    processes = [start_fetching(url, cache_dir) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda process: process.communicate("\n", TIMEOUT_S)[0], processes))
    assert outputs == [f"{len(CONTENT)}\n"] * 4
    assert server.bodies["/processes.bin"] == 1


def test_a_killed_process_leaves_no_lock_and_no_partial_file(
    server: FileServer, settings: Settings, cache_dir: Path
) -> None:
    url = server.put("/killed.bin", RawAnswer(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", closes=False))
    process = start_fetching(url, cache_dir)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    while not server.requests["/killed.bin"]:
        assert server.at_work.acquire(timeout=TIMEOUT_S)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    fetch(server.put("/unrelated.bin", CONTENT), settings)
    assert list(cache_dir.glob("*.part")) == []
    server.put("/killed.bin", CONTENT)
    assert fetch(url, settings) == CONTENT


@pytest.mark.parametrize("squatter", ["open to all", "link", "file"])
def test_a_world_writable_folder_is_not_trusted(
    server: FileServer, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squatter: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"comfy-worker-inputs-{os.getuid()}"
    if squatter == "file":
        folder.write_text("")
    elif squatter == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    url = server.put("/squatted.bin", CONTENT)
    with pytest.raises(InputFetchFailed, match="the worker's folder for inputs"):
        fetch(url, changed(settings, input_cache_dir=None))
    assert not server.requests["/squatted.bin"]


def test_its_own_folder_is_private(
    server: FileServer, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url = server.put("/own.bin", CONTENT)
    own = changed(settings, input_cache_dir=None)
    assert fetch(url, own) == fetch(url, own) == CONTENT
    [folder] = tmp_path.glob("comfy-worker-inputs-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert server.bodies["/own.bin"] == 1
