"""Who may use the gateway: Bearer keys, compared in constant time."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock
from starlette.datastructures import Headers

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.errors import Unauthorized

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SAFE_METHODS = ("GET", "HEAD")


class Keys:
    """The keys that clients may use; only their hashes are kept."""

    def __init__(self, keys: Iterable[str], hashes: Iterable[str] = ()) -> None:
        """Take keys as they are, and the SHA-256 of others."""
        self._hashes = [*(_hash(key) for key in keys if key), *hashes]

    @property
    def are_needed(self) -> bool:
        """Whether a request needs one."""
        return bool(self._hashes)

    def check(self, authorization: str | None) -> str:
        """Return the name by which the key's use is counted; it tells nothing of the key.

        Raises:
            Unauthorized: the header has no key, or one that is not ours.
        """
        if not self._hashes:
            return "anyone"
        given = _hash(_key_in(authorization or ""))
        # All are compared, however early one fits.
        found = [known for known in self._hashes if hmac.compare_digest(known, given)]
        if not found:
            raise Unauthorized("The request needs an API key", hint="Send the header Authorization: Bearer <key>")
        return found[0][:12]


class Guard:
    """Says who makes a request, and refuses those who must not."""

    def __init__(self, keys: Keys, origins: Iterable[str]) -> None:
        """Take the keys, and the origins of pages that may use the API."""
        self._keys = keys
        self._origins = set(origins)

    def admit(self, method: str, headers: Headers) -> str:
        """Return the name by which a request is counted.

        Raises:
            Unauthorized: it has no key; or it comes out of a browser that adds the key, or the way to the loopback,
                on behalf of a page that is not ours.
        """
        authorization = headers.get("authorization")
        # A browser sends what a person typed in (HTTP Basic) along with whatever a foreign page makes it ask for.
        is_typed_in = (authorization or "").lower().startswith("basic ")
        if is_typed_in and method not in _SAFE_METHODS:
            raise Unauthorized("A request that changes something needs its key as Authorization: Bearer <key>")
        if (is_typed_in or not self._keys.are_needed) and not self._is_from_here(headers):
            raise Unauthorized(
                "Pages of other origins may not use this gateway", hint="Name their origin in CORS_ORIGINS"
            )
        return self._keys.check(authorization)

    def _is_from_here(self, headers: Headers) -> bool:
        origin, host = headers.get("origin"), headers.get("host", "")
        if not self._keys.are_needed and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            # A page whose name was made to lead to the loopback after it was loaded.
            return False
        return origin is None or origin in self._origins or urlsplit(origin).netloc == host


def _key_in(authorization: str) -> str:
    """Return the key in a header: RunPod's clients send it bare in some places, browsers as a password."""
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() != "basic":
        return authorization.strip()
    try:
        return base64.b64decode(rest, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def read_hashes(file: str) -> list[str]:
    """Return the hashes of keys in a file, one a line.

    Raises:
        InvalidInput: the file cannot be read, has no hash, or has a line that is none.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InvalidInput("API_KEYS_FILE cannot be read") from None
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    # What sha256sum prints has the name of its input behind the hash.
    hashes = [words[0].lower() for words in lines if words]
    if not hashes or not all(_SHA256.fullmatch(found) for found in hashes):
        raise InvalidInput("API_KEYS_FILE must have the SHA-256 of a key on each line, and at least one")
    return hashes


def is_loopback(host: str) -> bool:
    """Return whether nobody but this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def kept_secret(file: Path, make: Callable[[], str] = lambda: secrets.token_urlsafe(32)) -> str:
    """Return the secret in a file that only its owner can read; it is made if it is not there."""
    if kept := _read_secret(file):
        return kept
    file.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes that start at once, one makes it.
    with FileLock(f"{file}.lock"):
        if kept := _read_secret(file):
            return kept
        secret = make()
        file.touch(mode=0o600)
        file.write_text(secret + "\n", encoding="ascii")
    return secret


def _read_secret(file: Path) -> str:
    return file.read_text(encoding="ascii").strip() if file.exists() else ""
