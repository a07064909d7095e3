"""The jobs of a soak test: small, of many shapes, each with its own colours, and their expected results."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Any

from tests.support.comfyui import graphs
from tests.support.comfyui.graphs import Color, Graph, node

_COLORS_PER_JOB = 4
_SPREAD = 0x9E3779B1
"""Odd, so that all numbers below 2**24 get different colours; those of neighbours differ much."""
_PICTURE_TOLERANCE = 1
"""Tolerance of a channel, because ComfyUI's images are floats and inverting rounds."""
_VIDEO_TOLERANCE = 16
"""Tolerance of a channel after H.264."""
_WORK_S = (0.01, 0.03, 0.06, 0.1)
"""Few values, so that the worker learns the run times and prefetches jobs."""
_LONG_S = 30.0
"""Work that only a cancel or a timeout ends."""


Colored = tuple[str, Color]
"""A node id and the colour of its output."""


class Cancel(str, Enum):
    """The state in which the client cancels a job."""

    QUEUED = "queued"
    RUNNING = "running"


@dataclass(frozen=True)
class Expected:
    """The expected files and texts of a job, in order, or its error code."""

    files: tuple[Colored, ...] = ()
    texts: tuple[str, ...] = ()
    code: str | None = None


@dataclass(frozen=True)
class SoakJob:
    """One job.

    Attributes:
        number: its index among all jobs, which decides its colours.
        shape: the name of its shape.
        input: RunPod's `input`.
        policy: RunPod's `policy`.
        cancel: the state in which the client cancels it.
        cancel_after_s: how many seconds after its start (only for a running job).
    """

    number: int
    shape: str
    input: Mapping[str, Any] = field(repr=False)
    expected: Expected = field(repr=False)
    policy: Mapping[str, Any] = field(default_factory=dict)
    cancel: Cancel | None = None
    cancel_after_s: float = 0.0


def color(number: int, index: int = 0) -> Color:
    """Return a colour of this job."""
    value = ((number * _COLORS_PER_JOB + index + 1) * _SPREAD) & 0xFFFFFF
    return value >> 16, value >> 8 & 0xFF, value & 0xFF


# ------------------------------------------------------------------------------------------------- shapes


def _worked(number: int, rng: Random, seconds: float | None = None, fail_at: int = 0) -> Graph:
    """Return nodes 1 and 3: an image of the job's colour, and work on it."""
    red, green, blue = color(number)
    seconds = rng.choice(_WORK_S) if seconds is None else seconds
    work = {"seconds": seconds, "steps": max(2, round(seconds / 0.02)), "fail_at": fail_at}
    return {
        "1": node(
            "EmptyImage", width=graphs.SIDE, height=graphs.SIDE, batch_size=1, color=red << 16 | green << 8 | blue
        ),
        "3": node("TestWork", image=["1", 0], preview=rng.random() < 0.2, **work),
    }


def _save(source: str = "3", prefix: str = "soak") -> dict[str, Any]:
    return node("SaveImage", images=[source, 0], filename_prefix=prefix)


def _picture(number: int, rng: Random) -> SoakJob:
    graph = {**_worked(number, rng), "9": _save()}
    job_input: dict[str, Any] = {"workflow": graph}
    if rng.random() < 0.5:
        job_input["retry_on_crash"] = True
    return SoakJob(number, "picture", job_input, Expected(files=(("9", color(number)),)))


def _two_pictures(number: int, rng: Random) -> SoakJob:
    other = color(number, 1)
    graph = {
        **_worked(number, rng),
        "9": _save(),
        **{f"{node_id}0": item for node_id, item in graphs.picture(other, "sub/soak").items()},
    }
    graph["90"]["inputs"]["images"] = ["10", 0]
    expected = Expected(files=(("9", color(number)), ("90", other)))
    return SoakJob(number, "two pictures", {"workflow": graph}, expected)


def _input_image(number: int, rng: Random) -> SoakJob:
    wanted = color(number)
    negative = (255 - wanted[0], 255 - wanted[1], 255 - wanted[2])
    name = f"poses/picture {number}.png"
    graph = {**_worked(number, rng), **graphs.inverted(name)}
    graph["3"]["inputs"]["image"] = ["2", 0]
    graph["9"] = _save()
    files = [{"name": name, "image": graphs.data_uri(graphs.png(negative))}]
    return SoakJob(number, "input image", {"workflow": graph, "images": files}, Expected(files=(("9", wanted),)))


def _websocket_picture(number: int, rng: Random) -> SoakJob:
    graph = {**_worked(number, rng), "9": node("SaveImageWebsocket", images=["3", 0])}
    return SoakJob(number, WEBSOCKET, {"workflow": graph}, Expected(files=(("9", color(number)),)))


def _preview(number: int, rng: Random) -> SoakJob:
    graph = {**_worked(number, rng), "8": node("PreviewImage", images=["1", 0]), "9": _save()}
    expected = Expected(files=(("8", color(number)), ("9", color(number))))
    return SoakJob(number, "preview", {"workflow": graph, "include_previews": True}, expected)


def _text(number: int, rng: Random) -> SoakJob:
    text = f"the text of job {number}"
    graph = {
        **_worked(number, rng),
        "5": node("PrimitiveString", value=text),
        "6": node("PreviewAny", source=["5", 0]),
        "9": _save(),
    }
    expected = Expected(files=(("9", color(number)),), texts=(text,))
    return SoakJob(number, "text", {"workflow": graph}, expected)


def _video(number: int, rng: Random) -> SoakJob:
    graph = {
        **_worked(number, rng),
        "4": node("RepeatImageBatch", image=["3", 0], amount=4),
        "5": node("CreateVideo", images=["4", 0], fps=8.0),
        "9": node("SaveVideo", video=["5", 0], filename_prefix="video/soak", format="auto", codec="auto"),
    }
    return SoakJob(number, "video", {"workflow": graph}, Expected(files=(("9", color(number)),)))


# --------------------------------------------------------------------------- jobs that fail


def _out_of_memory(number: int, rng: Random) -> SoakJob:
    graph = {**_worked(number, rng, fail_at=1), "9": _save()}
    return SoakJob(number, "out of memory", {"workflow": graph}, Expected(code="out_of_memory"))


def _broken_input(number: int, rng: Random) -> SoakJob:
    graph = {**_worked(number, rng), **graphs.inverted("broken.png")}
    cut_short = graphs.png(color(number))[:60]
    files = [{"name": "broken.png", "image": graphs.data_uri(cut_short)}]
    return SoakJob(number, "broken input", {"workflow": graph, "images": files}, Expected(code="execution_failed"))


def _missing_model(number: int, _rng: Random) -> SoakJob:
    graph = graphs.missing_model(f"model-{number}.safetensors")
    return SoakJob(number, "missing model", {"workflow": graph}, Expected(code="missing_models"))


def _bad_input(number: int, _rng: Random) -> SoakJob:
    files = [{"name": "a.png", "image": "@@@@"}]
    return SoakJob(
        number,
        "bad input",
        {"workflow": graphs.inverted("a.png"), "images": files},
        Expected(code="invalid_input"),
    )


def _timeout(number: int, rng: Random) -> SoakJob:
    graph = {**_worked(number, rng, _LONG_S), "9": _save()}
    limit = round(rng.uniform(0.15, 0.6), 3)
    return SoakJob(number, "timeout_s", {"workflow": graph, "timeout_s": limit}, Expected(code="timed_out"))


def _execution_timeout(number: int, rng: Random) -> SoakJob:
    graph = {**_worked(number, rng, _LONG_S), "9": _save()}
    policy = {"executionTimeout": rng.randrange(150, 600)}
    return SoakJob(number, EXECUTION_TIMEOUT, {"workflow": graph}, Expected(code="timed_out"), policy)


def _cancel_queued(number: int, rng: Random) -> SoakJob:
    graph = {**_worked(number, rng, _LONG_S), "9": _save()}
    return SoakJob(
        number, "cancelled while queued", {"workflow": graph}, Expected(code="cancelled"), cancel=Cancel.QUEUED
    )


def cancel_running(number: int, rng: Random) -> SoakJob:
    """Return a job that is cancelled shortly after its start."""
    graph = {**_worked(number, rng, _LONG_S), "9": _save()}
    return SoakJob(
        number,
        "cancelled while running",
        {"workflow": graph},
        Expected(code="cancelled"),
        cancel=Cancel.RUNNING,
        cancel_after_s=rng.uniform(0.0, 0.4),
    )


WEBSOCKET = "websocket picture"
EXECUTION_TIMEOUT = "executionTimeout"
Shape = Callable[[int, Random], SoakJob]
INPUT_IMAGE: Shape = _input_image
WEBSOCKET_PICTURE: Shape = _websocket_picture
SHAPES: Mapping[Shape, int] = {
    _picture: 24,
    _two_pictures: 12,
    _input_image: 14,
    _websocket_picture: 10,
    _preview: 8,
    _text: 8,
    _video: 6,
    _out_of_memory: 3,
    _broken_input: 2,
    _missing_model: 2,
    _bad_input: 2,
    _timeout: 2,
    _execution_timeout: 2,
    _cancel_queued: 2,
    cancel_running: 3,
}
"""The weight of each shape."""


# ------------------------------------------------------------------------------------------------- checks


def problems_of(job: SoakJob, output: Mapping[str, Any], *, may_lack_files: bool) -> list[str]:
    """Return what is wrong with the output of a completed job.

    Args:
        job: the job.
        output: RunPod's `output`.
        may_lack_files: whether a file may be missing with a warning.
    """
    expected = job.expected
    if expected.code is not None:
        return [f"completed instead of failing with {expected.code}"]
    texts = tuple(item["text"] for item in output.get("texts", ()))
    problems = [] if texts == expected.texts else [f"texts {texts} instead of {expected.texts}"]
    try:
        files = [(item["node_id"], *_color_and_tolerance(item)) for item in _files(output)]
    except (OSError, ValueError) as error:
        return [*problems, f"a file cannot be read: {error}"]
    made = {node_id for node_id, _, _ in files}
    lacks_some = may_lack_files and "errors" in output
    wanted = [file for file in expected.files if file[0] in made or not lacks_some]
    if len(files) != len(wanted) or not all(map(_is_wanted, files, wanted)):
        problems.append(f"files {files} instead of {wanted}")
    return problems


def _files(output: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [item for name in ("images", "videos", "audio", "files") for item in output.get(name, ())]


def _color_and_tolerance(item: Mapping[str, Any]) -> tuple[Color, int]:
    content = base64.b64decode(item["data"], validate=True)
    if item["mime_type"].startswith("video/"):
        return _video_color(content), _VIDEO_TOLERANCE
    [found] = graphs.colors(content)
    return found, _PICTURE_TOLERANCE


def _video_color(content: bytes) -> Color:
    import av

    with av.open(io.BytesIO(content)) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    red, green, blue = (round(float(value)) for value in frame.reshape(-1, 3).mean(axis=0))
    return red, green, blue


def _is_wanted(found: tuple[str, Color, int], wanted: Colored) -> bool:
    node_id, color_found, tolerance = found
    distance = max(abs(one - other) for one, other in zip(color_found, wanted[1], strict=True))
    return node_id == wanted[0] and distance <= tolerance
