"""Videos, as long as a test needs them."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIDE = 64
DURATION_S = 2.0
_FRAMES_PER_S = 8


def mp4() -> bytes:
    """Return a small video; what says how long it is stands at its end, as encoders usually write it."""
    written = io.BytesIO()
    with av.open(written, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(_FRAMES_PER_S))
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(round(DURATION_S * _FRAMES_PER_S)):
            frame = av.VideoFrame.from_ndarray(np.full((SIDE, SIDE, 3), number * 15, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return written.getvalue()


def write_mp4(path: Path, size: int) -> None:
    """Write a video that has `size` bytes, most of them in a box that players skip."""
    content = mp4()
    with path.open("wb") as file:
        # ISO 14496-12: a box begins with its length, 4 bytes, and its type; readers skip "free".
        file.write(content)
        file.write((size - len(content)).to_bytes(4, "big") + b"free")
        file.truncate(size)
