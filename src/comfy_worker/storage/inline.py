"""Outputs inside the answer, as base64."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from comfy_worker.jobs import Delivered

if TYPE_CHECKING:
    from comfy_worker.storage import Parcel


class InlineStorage:
    """Encodes files as base64."""

    def deliver(self, parcel: Parcel) -> Delivered:
        """Return the file itself."""
        return Delivered("base64", base64.b64encode(parcel.content).decode("ascii"))
