"""API keys, each with the name of its owner, and the authentication of requests with them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock
from starlette.datastructures import Headers

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.callers import ANYONE, NOBODY, Caller
from comfy_worker.gateway.errors import Unauthorized, WrongKey

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[\w.@+-]{1,64}")
_NAMED = re.compile(rf"({_NAME.pattern})[:=](.*[^=\s].*)")
_SAFE_METHODS = ("GET", "HEAD")


class Keys:
    """The keys of clients, with the names of their owners; only hashes of the keys are stored."""

    def __init__(self, keys: Iterable[str], hashes: Iterable[str] = (), admins: Iterable[str] = ()) -> None:
        """Take the keys; several keys with one name belong to one caller.

        Args:
            keys: `key`, `name:key` or `name=key`.
            hashes: the SHA-256 of further keys, in the same form.
            admins: keys that see and cancel all jobs, in the same form.

        Raises:
            InvalidInput: a key has two names, or is an administrator's and another's.
        """
        ordinary = [_Key.of(text) for text in keys if text] + [_Key.of_hash(text) for text in hashes]
        of_admins = [_Key.of(text) for text in admins if text]
        self._callers: dict[str, Caller] = {}
        names = {key.name for key in ordinary}
        is_alone = len(names.union(key.name for key in of_admins)) == 1
        for key in of_admins:
            self._add(key, Caller(key.name, key.name, None, is_alone))
        for key in ordinary:
            # Jobs that were submitted before the key had its name stay visible to it.
            owners = {key.name, *(other.first_name for other in ordinary if other.name == key.name)}
            if len(names) == 1:
                owners.add(NOBODY)
            self._add(key, Caller(key.name, key.name, frozenset(owners), is_alone))

    def _add(self, key: _Key, caller: Caller) -> None:
        if self._callers.setdefault(key.hash, caller) != caller:
            raise InvalidInput(
                f"The key of {caller.name!r} is also that of {self._callers[key.hash].name!r}",
                hint="Each key has one name, in API_KEYS, API_ADMIN_KEYS and API_KEYS_FILE together",
            )

    @property
    def are_needed(self) -> bool:
        """Whether requests need a key."""
        return bool(self._callers)

    def check(self, authorization: str | None) -> Caller:
        """Return the caller with the key in a header.

        Raises:
            Unauthorized: there is no key, or it is wrong.
        """
        if not self._callers:
            return ANYONE
        given = _hash(_key_in(authorization or ""))
        # All are compared, so that the time tells nothing about the key.
        found = [caller for known, caller in self._callers.items() if hmac.compare_digest(known, given)]
        if not found:
            refusal = WrongKey if authorization else Unauthorized
            raise refusal("The request needs an API key", hint="Send the header Authorization: Bearer <key>")
        return found[0]


@dataclass(frozen=True)
class _Key:
    """A key's hash and the name of its owner."""

    hash: str
    name: str

    @classmethod
    def of(cls, text: str) -> _Key:
        name, key = split_name(text)
        return cls.of_hash(f"{name}:{_hash(key)}")

    @classmethod
    def of_hash(cls, text: str) -> _Key:
        name, _, digest = text.rpartition(":")
        return cls(digest, name or _first_name(digest))

    @property
    def first_name(self) -> str:
        """The name of a key without a name."""
        return _first_name(self.hash)


def _first_name(digest: str) -> str:
    return f"key-{digest[:12]}"


def split_name(text: str) -> tuple[str, str]:
    """Return the name and the key in `name:key` or `name=key`; a bare key has the name "".

    What precedes the first `:` or `=` is the name if it has the form of one; the `=` at the end of a key in base64
    belongs to the key.
    """
    named = _NAMED.fullmatch(text)
    return (named[1], named[2].strip()) if named else ("", text)


class Authenticator:
    """Identifies the caller of a request, and rejects requests that browsers make for foreign pages."""

    def __init__(self, keys: Keys, origins: Iterable[str]) -> None:
        """Take the keys, and the origins whose pages may use the API."""
        self._keys = keys
        self._origins = set(origins)

    def authenticate(self, method: str, headers: Headers) -> Caller:
        """Return the caller.

        Raises:
            Unauthorized: the key is missing or wrong; or a foreign page uses the key that a browser has stored, or the
                browser's access to the loopback interface.
        """
        authorization = headers.get("authorization")
        # Browsers add a key that was entered (HTTP Basic) to the requests of foreign pages, too.
        is_from_browser = (authorization or "").lower().startswith("basic ")
        if is_from_browser and method not in _SAFE_METHODS:
            raise Unauthorized("A request that changes something needs its key as Authorization: Bearer <key>")
        if (is_from_browser or not self._keys.are_needed) and not self._is_same_origin(headers):
            raise Unauthorized(
                "Pages of other origins may not use this gateway", hint="Name their origin in CORS_ORIGINS"
            )
        return self._keys.check(authorization)

    def _is_same_origin(self, headers: Headers) -> bool:
        origin, host = headers.get("origin"), headers.get("host", "")
        if not self._keys.are_needed and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            # DNS rebinding: the name of a foreign page now resolves to the loopback interface.
            return False
        return origin is None or origin in self._origins or urlsplit(origin).netloc == host


def _key_in(authorization: str) -> str:
    """Return the key in a header: some of RunPod's clients send it bare, browsers as a password."""
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
    """Return the hashes of keys in a file, one a line, as `hash` or `name:hash`.

    Raises:
        InvalidInput: the file cannot be read, has no hash, or has an invalid line.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InvalidInput("API_KEYS_FILE cannot be read") from None
    lines = [line.partition("#")[0].split(maxsplit=1) for line in text.splitlines()]
    hashes = [_named_hash(*words) for words in lines if words]
    if not hashes:
        raise _no_hashes()
    return hashes


def _named_hash(digest: str, file: str = "-") -> str:
    """Return a line of the file as `name:hash`; sha256sum prints the name of its input file, or `-`."""
    if not _SHA256.fullmatch(digest.lower()):
        raise _no_hashes()
    name = file.strip().removeprefix("*").rpartition("/")[2]
    if name == "-":
        return digest.lower()
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            "A name in API_KEYS_FILE has up to 64 letters, digits, '.', '_', '@', '+' and '-'",
            hint="The name stands behind the hash; `-` for none",
        )
    return f"{name}:{digest.lower()}"


def _no_hashes() -> InvalidInput:
    return InvalidInput("API_KEYS_FILE must have the SHA-256 of a key on each line, and at least one")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def stored_secret(file: Path, make: Callable[[], str] = lambda: secrets.token_urlsafe(32)) -> str:
    """Return the secret in a file that only its owner can read; create the file if it does not exist."""
    if stored := _read_secret(file):
        return stored
    file.parent.mkdir(parents=True, exist_ok=True)
    # If several processes start at once, one of them creates it.
    with FileLock(f"{file}.lock"):
        if stored := _read_secret(file):
            return stored
        secret = make()
        file.touch(mode=0o600)
        file.write_text(secret + "\n", encoding="ascii")
    return secret


def _read_secret(file: Path) -> str:
    return file.read_text(encoding="ascii").strip() if file.exists() else ""
