"""Video nodes on PyAV, which is imported when the first of them runs (`comfy_extras/nodes_video.py`)."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from comfy_emulator.folder_paths import FolderPaths
from comfy_emulator.node_api import ImageBatch, NodeContext, NodeResult
from comfy_emulator.nodes.audio import Audio, audio_frame, encode_audio
from comfy_emulator.nodes.file_inputs import file_validator
from comfy_emulator.nodes.pixels import FloatArray
from comfy_emulator.nodes.registry import REGISTRY
from comfy_emulator.nodes.save_paths import metadata_texts, output_path

_WEBM_ENCODERS = {"vp9": "libvpx-vp9", "av1": "libsvtav1"}
_WEBM_PIXELS = {"vp9": "yuv420p", "av1": "yuv420p10le"}
_KEEP_ALL_METADATA = {"movflags": "use_metadata_tags"}


@dataclass(frozen=True)
class VideoComponents:
    """A decoded video: images, audio, and images per second."""

    images: ImageBatch
    audio: Audio | None
    frame_rate: Fraction


class Video(Protocol):
    """ComfyUI's VIDEO (`comfy_api/input/video_types.py`)."""

    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""

    def components(self) -> VideoComponents:
        """Decode the video."""

    def save(self, path: Path, container_format: str, codec: str, metadata: dict[str, str]) -> None:
        """Write the video to a file; `auto` means any format or codec."""


@dataclass(frozen=True)
class VideoFromComponents:
    """A video of images and audio."""

    parts: VideoComponents

    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.parts.images.shape[2], self.parts.images.shape[1]

    def components(self) -> VideoComponents:
        """Decode the video."""
        return self.parts

    def save(self, path: Path, container_format: str, codec: str, metadata: dict[str, str]) -> None:
        """Write an MP4 file with H.264 and AAC.

        Raises:
            ValueError: another format or codec is requested.
        """
        if container_format not in ("auto", "mp4"):
            raise ValueError("Only MP4 format is supported for now")
        if codec not in ("auto", "h264"):
            raise ValueError("Only H264 codec is supported for now")
        _write_mp4(path, self.parts, metadata)


@dataclass(frozen=True)
class VideoFromFile:
    """A video in a file."""

    path: Path

    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        import av

        with av.open(str(self.path)) as container:
            if not container.streams.video:
                raise ValueError(f"No video stream found in file '{self.path}'")
            stream = container.streams.video[0]
            return stream.width, stream.height

    def components(self) -> VideoComponents:
        """Decode the video."""
        import av

        with av.open(str(self.path)) as container:
            stream = container.streams.video[0]
            rate = Fraction(stream.average_rate) if stream.average_rate else Fraction(1)
            frames = [
                frame.to_ndarray(format="rgb24").astype(np.float32) / np.float32(255.0)
                for frame in container.decode(video=0)
            ]
        return VideoComponents(np.stack(frames), _audio_of(self.path), rate)

    def save(self, path: Path, container_format: str, codec: str, metadata: dict[str, str]) -> None:
        """Copy the tracks; encode them again only if another format or codec is requested."""
        import av

        with av.open(str(self.path)) as container:
            formats = container.format.name.split(",")
            encoding = container.streams.video[0].codec.name if container.streams.video else codec
        if container_format not in ("auto", *formats) or codec not in ("auto", encoding):
            VideoFromComponents(self.components()).save(path, container_format, codec, metadata)
        else:
            _copy_tracks(self.path, path, metadata)


def _audio_of(path: Path) -> Audio | None:
    """Return the first audio track of a file as it is stored: integers stay integers."""
    import av

    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        parts = [frame.to_ndarray() for frame in container.decode(stream)]
        rate = stream.sample_rate
    return Audio(waveform=np.concatenate(parts, axis=1)[np.newaxis], sample_rate=rate) if parts else None


def _copy_tracks(source: Path, path: Path, metadata: dict[str, str]) -> None:
    import av

    with av.open(str(source)) as container, av.open(str(path), mode="w", options=_KEEP_ALL_METADATA) as output:
        output.metadata.update({**container.metadata, **metadata})
        copies: dict[int, Any] = {
            stream.index: output.add_stream_from_template(stream, opaque=True)
            for stream in container.streams
            if stream.type in ("video", "audio", "subtitle")
        }
        for packet in container.demux():
            if packet.stream.index in copies and packet.dts is not None:
                packet.stream = copies[packet.stream.index]
                output.mux(packet)


def _write_mp4(path: Path, parts: VideoComponents, metadata: dict[str, str]) -> None:
    import av

    rate = Fraction(round(parts.frame_rate * 1000), 1000)
    with av.open(str(path), mode="w", options=_KEEP_ALL_METADATA) as container:
        container.metadata.update(metadata)
        video: Any = container.add_stream("h264", rate=rate)
        sound: Any = container.add_stream("aac", rate=parts.audio["sample_rate"]) if parts.audio else None
        _encode_images(container, video, parts.images, "yuv420p")
        if parts.audio:
            samples = math.ceil(parts.audio["sample_rate"] / rate * len(parts.images))
            frame = audio_frame(parts.audio["waveform"][0, :, :samples], parts.audio["sample_rate"])
            encode_audio(container, sound, frame)


def _encode_images(container: Any, stream: Any, images: FloatArray, pixels: str) -> None:
    import av

    stream.height, stream.width = images.shape[1:3]
    stream.pix_fmt = pixels
    for image in images:
        levels = np.ascontiguousarray(np.clip(image[..., :3] * 255, 0, 255).astype(np.uint8))
        container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
    container.mux(stream.encode(None))


@REGISTRY.add("CreateVideo")
def create_video(_context: NodeContext, images: ImageBatch, fps: float, audio: Audio | None = None) -> NodeResult:
    """Return a video of images and optional audio."""
    return NodeResult((VideoFromComponents(VideoComponents(images, audio, Fraction(fps))),))


def _modification_time(folders: FolderPaths, file: str) -> float:
    return folders.annotated_path(file).stat().st_mtime


@REGISTRY.add(
    "LoadVideo", validate=file_validator("file", "video"), validates=("file",), fingerprint=_modification_time
)
def load_video(context: NodeContext, file: str) -> NodeResult:
    """Return a video file, which is read when it is needed."""
    return NodeResult((VideoFromFile(context.folders.annotated_path(file)),))


@REGISTRY.add("GetVideoComponents")
def get_video_components(_context: NodeContext, video: Video) -> NodeResult:
    """Return images, audio and images per second of a video."""
    parts = video.components()
    return NodeResult((parts.images, parts.audio, float(parts.frame_rate)))


@REGISTRY.add("SaveVideo")
def save_video(
    context: NodeContext,
    video: Video,
    filename_prefix: str,
    format: str,  # noqa: A002 - the input's name
    codec: str,
) -> NodeResult:
    """Save an MP4 file in the output folder."""
    file, entry = output_path(context, filename_prefix, *video.size()).next_file("mp4")
    video.save(file, format, codec, metadata_texts(context))
    return NodeResult(ui={"images": [entry], "animated": [True]})


@REGISTRY.add("SaveWEBM")
def save_webm(
    context: NodeContext, images: ImageBatch, filename_prefix: str, codec: str, fps: float, crf: float
) -> NodeResult:
    """Save a WebM file in the output folder; a `crf` of 0 is the best quality, 63 the smallest file."""
    import av

    file, entry = output_path(context, filename_prefix, images.shape[2], images.shape[1]).next_file("webm")
    options = {"crf": str(crf), **({"preset": "6"} if codec == "av1" else {})}

    def encode() -> None:
        with av.open(str(file), mode="w") as container:
            container.metadata.update(metadata_texts(context))
            rate = Fraction(round(fps * 1000), 1000)
            stream: Any = container.add_stream(_WEBM_ENCODERS[codec], rate=rate, options=options)
            stream.bit_rate = 0
            _encode_images(container, stream, images, _WEBM_PIXELS[codec])

    # SVT-AV1, run as root, gives the thread that opens it real-time priority for good, and threads started by it
    # inherit that and starve the machine. A thread of its own ends with the encoding.
    with ThreadPoolExecutor(1, "encode") as thread:
        thread.submit(encode).result()
    return NodeResult(ui={"images": [entry], "animated": [True]})
