"""What must not leave the worker."""

from __future__ import annotations

from tests.support.paths import ROOT
from tests.support.runpod.platform_http import WORKER_KEY
from tests.support.storage.s3_server import SECRET_KEY

JOB_SECRET = "comfyui-9d41c07e5b7a"
"""A key that jobs of these tests carry."""


def assert_nothing_leaks(text: str) -> None:
    """Check that a text names no place in the checkout, has no traceback and no secret."""
    for forbidden in (str(ROOT), "site-packages", "Traceback", WORKER_KEY, SECRET_KEY, JOB_SECRET):
        # Only where it was found: the whole text may have pictures in it.
        place = text.find(forbidden)
        assert place < 0, f"{forbidden!r} leaked: …{text[max(0, place - 200) : place + 200]}…"
