"""Small workflows in API format, from nodes that need no model, and the pictures that go with them."""

from __future__ import annotations

import base64
import io
import random
from typing import Any

from PIL import Image

Graph = dict[str, dict[str, Any]]
Color = tuple[int, int, int]

SIDE = 32


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """Return a node."""
    return {"class_type": class_type, "inputs": inputs}


def picture(color: Color, prefix: str = "ComfyUI") -> Graph:
    """Return a workflow that saves a picture of one color."""
    red, green, blue = color
    return {
        "1": node("EmptyImage", width=SIDE, height=SIDE, batch_size=1, color=red << 16 | green << 8 | blue),
        "9": node("SaveImage", images=["1", 0], filename_prefix=prefix),
    }


def two_pictures(first: Color, second: Color) -> Graph:
    """Return a workflow that saves two pictures under the same name, the second in a folder `sub`."""
    other = {f"{node_id}0": node for node_id, node in picture(second, "sub/ComfyUI").items()}
    other["90"]["inputs"]["images"] = ["10", 0]
    return {**picture(first), **other}


def inverted(image_name: str) -> Graph:
    """Return a workflow that loads a picture and saves its negative."""
    return {
        "1": node("LoadImage", image=image_name),
        "2": node("ImageInvert", image=["1", 0]),
        "9": node("SaveImage", images=["2", 0], filename_prefix="inverted"),
    }


def work(seconds: float, *, steps: int = 10, fail_at: int = 0) -> Graph:
    """Return a workflow whose node 3 takes a set time, and fails after step `fail_at` unless that is 0.

    Its color is drawn by lot: ComfyUI would not do the same work twice.
    """
    graph = picture((random.randrange(256), random.randrange(256), random.randrange(256)))
    graph["3"] = node("TestWork", image=["1", 0], seconds=seconds, steps=steps, preview=False, fail_at=fail_at)
    graph["9"]["inputs"]["images"] = ["3", 0]
    return graph


def missing_model(name: str) -> Graph:
    """Return a workflow whose node 30 wants a checkpoint that is not there."""
    return {
        "30": node("CheckpointLoaderSimple", ckpt_name=name),
        "31": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "32": node("VAEDecode", samples=["31", 0], vae=["30", 2]),
        "9": node("SaveImage", images=["32", 0], filename_prefix="ComfyUI"),
    }


def png(color: Color) -> bytes:
    """Return a picture of one color as a PNG file."""
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), color).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(content: bytes) -> str:
    """Return a PNG as people send it."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def colors(content: bytes) -> list[Color]:
    """Return every color that occurs in a picture file."""
    with Image.open(io.BytesIO(content)) as image:
        found = image.convert("RGB").getcolors(SIDE * SIDE * 2**10)
    return [color for _, color in found or ()]
