"""Small files of every kind that ComfyUI loads."""

from __future__ import annotations

import io
import json
import struct
import wave

import av
import numpy as np
from safetensors.numpy import save

RATE = 8000


def wav(samples: int = 800) -> bytes:
    """Return a tone, as 16-bit PCM."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(tone(samples).tobytes())
    return buffer.getvalue()


def tone(samples: int) -> np.ndarray[tuple[int], np.dtype[np.int16]]:
    """Return the tone's samples."""
    return (np.sin(np.arange(samples) / 5) * 20000).astype("<i2")


def mp4(frames: int = 5, side: int = 32) -> bytes:
    """Return a video of frames that get lighter."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            pixels = np.full((side, side, 3), number * 40, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def latent(value: float = 0.5) -> bytes:
    """Return a latent of 4 channels of 4 x 4, in the format that ComfyUI saves."""
    tensors = {
        "latent_tensor": np.full((1, 4, 4, 4), value, dtype=np.float32),
        "latent_format_version_0": np.array([], dtype=np.float32),
    }
    return save(tensors)


def glb() -> bytes:
    """Return a scene with nothing in it."""
    scene = json.dumps({"asset": {"version": "2.0"}, "scenes": [{"nodes": []}], "scene": 0}).encode()
    scene += b" " * (-len(scene) % 4)
    chunk = struct.pack("<II", len(scene), 0x4E4F534A) + scene
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunk)) + chunk
