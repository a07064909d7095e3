"""JSON responses that can hold any text."""

from __future__ import annotations

import json
from typing import Any

from fastapi.responses import JSONResponse


class SafeJSONResponse(JSONResponse):
    """JSON in which lone surrogates are escaped.

    A workflow, an error of ComfyUI or a text output may contain a lone surrogate. UTF-8 cannot encode it, and pydantic
    refuses it, so handlers whose response quotes such texts return this class instead of a model.
    """

    def render(self, content: Any) -> bytes:
        """Return the encoded content."""
        try:
            return super().render(content)
        except UnicodeEncodeError:
            return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
