"""Outputs inside the answer, as base64, as far as they fit."""

from __future__ import annotations

import base64
import threading
from typing import TYPE_CHECKING

from comfy_worker.errors import OutputTooLarge
from comfy_worker.jobs import Delivered

if TYPE_CHECKING:
    from comfy_worker.storage import Parcel, Storage


class InlineStorage:
    """Encodes the files of one job as base64; what does not fit into the answer goes elsewhere.

    The budget is counted in characters of the answer, for base64 makes files a third larger.
    """

    def __init__(self, budget: int | None = None, overflow: Storage | None = None) -> None:
        self._budget = budget
        self._overflow = overflow
        self._used = 0
        self._lock = threading.Lock()

    def deliver(self, parcel: Parcel) -> Delivered:
        """Return the file itself, or where it is if it does not fit.

        Raises:
            OutputTooLarge: it does not fit, and there is nowhere else.
        """
        if self._fits(4 * -(-len(parcel.content) // 3)):
            return Delivered("base64", base64.b64encode(parcel.content).decode("ascii"))
        if self._overflow is not None:
            return self._overflow.deliver(parcel)
        raise OutputTooLarge(
            f"The outputs do not fit into the answer, which takes {self._budget} characters of base64",
            hint="Set up S3 (BUCKET_ENDPOINT_URL and its keys), or make fewer, smaller or more compressed outputs",
        )

    def _fits(self, characters: int) -> bool:
        with self._lock:
            if self._budget is not None and self._used + characters > self._budget:
                return False
            self._used += characters
            return True
