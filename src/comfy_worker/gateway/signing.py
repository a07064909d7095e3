"""Links to outputs that work without a key, for a while."""

from __future__ import annotations

import hashlib
import time
from urllib.parse import quote, urlencode

from itsdangerous import Signer

from comfy_worker.gateway.errors import Unauthorized

PATH = "/assets"
IMAGES_PATH = "/api/v1/images/generated"
SIGNED_PATHS = (PATH, IMAGES_PATH)
"""Below these a link with a signature does without a key."""


class AssetLinks:
    """Makes and checks links: `/assets/<job>/<path>?expires=<seconds since the epoch>&signature=<HMAC-SHA256>`."""

    def __init__(self, secret: str, expires_s: int) -> None:
        """Take the secret that links are signed with, and how long they work."""
        self._signer = Signer(secret, salt="asset", digest_method=hashlib.sha256, key_derivation="hmac")
        self._expires_s = expires_s

    def url(self, base: str, path: str, prefix: str = PATH) -> str:
        """Return the link to the asset `<job>/<path>` below the gateway's own URL and one of `SIGNED_PATHS`."""
        expires = int(time.time()) + self._expires_s
        query = {"expires": expires, "signature": self._sign(path, expires)}
        return f"{base.rstrip('/')}{prefix}/{quote(path)}?{urlencode(query)}"

    def check(self, path: str, expires: int, signature: str) -> None:
        """Return if a link is whole and has not expired.

        Raises:
            Unauthorized: it is not, or has.
        """
        if not self._signer.verify_signature(_signed(path, expires), signature):
            raise Unauthorized("The link's signature is not right", hint="Take the link as it is from the job's output")
        if time.time() > expires:
            raise Unauthorized("The link has expired", hint="Ask for the job's status again")

    def _sign(self, path: str, expires: int) -> str:
        return self._signer.get_signature(_signed(path, expires)).decode("ascii")


def _signed(path: str, expires: int) -> bytes:
    return f"{expires}:{path}".encode(errors="surrogatepass")
