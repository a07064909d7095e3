"""Links to outputs that work without a key, for a limited time."""

from __future__ import annotations

import hashlib
import time
from urllib.parse import quote, urlencode

from itsdangerous import Signer

from comfy_worker.gateway.errors import Unauthorized

PATH = "/assets"
IMAGES_PATH = "/api/v1/images/generated"
CALLBACK_PATH = "/runpod/webhook"
SIGNED_PATHS = (PATH, IMAGES_PATH, CALLBACK_PATH)
"""Paths at which a signed link needs no key."""


class AssetLinks:
    """Makes and checks links: `/assets/<job>/<path>?expires=<seconds since the epoch>&signature=<HMAC-SHA256>`."""

    def __init__(self, secret: str, expires_s: int) -> None:
        """Take the secret that links are signed with, and how long they are valid."""
        self._signer = Signer(secret, salt="asset", digest_method=hashlib.sha256, key_derivation="hmac")
        self._expires_s = expires_s

    def url(self, base: str, path: str, prefix: str = PATH) -> str:
        """Return the link to the file `<job>/<path>`, below the gateway's URL and one of `SIGNED_PATHS`."""
        expires = int(time.time()) + self._expires_s
        query = {"expires": expires, "signature": self._sign(path, expires)}
        return f"{base.rstrip('/')}{prefix}/{quote(path)}?{urlencode(query)}"

    def check(self, path: str, expires: int, signature: str) -> None:
        """Return if a link is intact and has not expired.

        Raises:
            Unauthorized: it is not, or it has.
        """
        if not self._signer.verify_signature(_signed(path, expires), signature):
            raise Unauthorized("The link's signature is invalid", hint="Use the link from the job's output unchanged")
        if time.time() > expires:
            raise Unauthorized("The link has expired", hint="Ask for the job's status again")

    def _sign(self, path: str, expires: int) -> str:
        return self._signer.get_signature(_signed(path, expires)).decode("ascii")


def _signed(path: str, expires: int) -> bytes:
    return f"{expires}:{path}".encode(errors="surrogatepass")


class CallbackLinks:
    """Makes and checks the URLs of RunPod's webhooks to the gateway: `/runpod/webhook/<job>?signature=<HMAC>`."""

    def __init__(self, secret: str, public_url: str) -> None:
        """Take the secret that they are signed with, and the gateway's public URL; empty if it has none."""
        self._signer = Signer(secret, salt="runpod webhook", digest_method=hashlib.sha256, key_derivation="hmac")
        self._public_url = public_url

    def url(self, job_id: str) -> str | None:
        """Return the URL for a job, None if RunPod cannot reach the gateway."""
        if not self._public_url:
            return None
        query = urlencode({"signature": self._signer.get_signature(job_id).decode("ascii")})
        return f"{self._public_url}{CALLBACK_PATH}/{quote(job_id, safe='')}?{query}"

    def check(self, job_id: str, signature: str) -> None:
        """Return if a signature is that of a job's URL.

        Raises:
            Unauthorized: it is not.
        """
        if not self._signer.verify_signature(job_id.encode(errors="surrogatepass"), signature):
            raise Unauthorized("The URL's signature is not right")
