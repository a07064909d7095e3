"""Audio nodes on PyAV, which is imported when the first of them runs (`comfy_extras/nodes_audio.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from comfy_emulator.node_api import NodeContext, NodeResult
from comfy_emulator.nodes.file_inputs import file_fingerprint, file_validator
from comfy_emulator.nodes.pixels import FloatArray
from comfy_emulator.nodes.registry import REGISTRY
from comfy_emulator.nodes.save_paths import SavePath, metadata_texts, output_path, temp_path


class Audio(TypedDict):
    """ComfyUI's AUDIO: float32 samples of shape (batch, channels, samples), -1 to 1, and samples per second."""

    waveform: FloatArray
    sample_rate: int


_ENCODERS = {"flac": "flac", "mp3": "libmp3lame", "opus": "libopus"}
_FULL_SCALE = {np.dtype(np.int16): 2**15, np.dtype(np.int32): 2**31, np.dtype(np.float32): 1, np.dtype(np.float64): 1}
_OPUS_RATES = (8000, 12000, 16000, 24000, 48000)


@REGISTRY.add("EmptyAudio")
def empty_audio(_context: NodeContext, duration: float, sample_rate: int, channels: int) -> NodeResult:
    """Return `duration` seconds of silence."""
    samples = round(duration * sample_rate)
    return NodeResult((Audio(waveform=np.zeros((1, channels, samples), np.float32), sample_rate=sample_rate),))


@REGISTRY.add(
    "LoadAudio",
    validate=file_validator("audio", "audio"),
    validates=("audio",),
    fingerprint=file_fingerprint("audio"),
)
def load_audio(context: NodeContext, audio: str) -> NodeResult:
    """Return the audio of an audio or video file."""
    return NodeResult((read_audio(context.folders.annotated_path(audio)),))


def read_audio(path: Path) -> Audio:
    """Return the first audio track of a file.

    Raises:
        ValueError: the file has none, or it is empty.
    """
    import av

    with av.open(str(path)) as container:
        if not container.streams.audio:
            raise ValueError("No audio stream found in the file.")
        stream = container.streams.audio[0]
        channels, rate = stream.channels, stream.sample_rate
        parts = [_planar(frame.to_ndarray(), channels) for frame in container.decode(stream)]
    if not parts:
        raise ValueError("No audio frames decoded.")
    return Audio(waveform=np.concatenate(parts, axis=1)[np.newaxis], sample_rate=rate)


def _planar(samples: Any, channels: int) -> FloatArray:
    """Return decoded samples, interleaved or not, integers or floats, as float32 of shape (channels, samples)."""
    if samples.shape[0] != channels:
        samples = samples.reshape(-1, channels).T
    if samples.dtype not in _FULL_SCALE:
        raise ValueError(f"Unsupported wav dtype: {samples.dtype}")
    scaled: FloatArray = samples.astype(np.float32) / np.float32(_FULL_SCALE[samples.dtype])
    return scaled


@REGISTRY.add("SaveAudio")
def save_audio(context: NodeContext, audio: Audio, filename_prefix: str = "ComfyUI") -> NodeResult:
    """Save FLAC files in the output folder."""
    return _save(context, audio, output_path(context, filename_prefix), "flac")


@REGISTRY.add("SaveAudioMP3")
def save_audio_mp3(context: NodeContext, audio: Audio, filename_prefix: str, quality: str) -> NodeResult:
    """Save MP3 files in the output folder, with `V0` (variable), `128k` or `320k` bits per second."""
    return _save(context, audio, output_path(context, filename_prefix), "mp3", quality)


@REGISTRY.add("SaveAudioOpus")
def save_audio_opus(context: NodeContext, audio: Audio, filename_prefix: str, quality: str) -> NodeResult:
    """Save Opus files in the output folder, with `64k` to `320k` bits per second."""
    return _save(context, audio, output_path(context, filename_prefix), "opus", quality)


@REGISTRY.add("PreviewAudio")
def preview_audio(context: NodeContext, audio: Audio) -> NodeResult:
    """Save FLAC files in the temp folder."""
    return _save(context, audio, temp_path(context), "flac")


def _save(context: NodeContext, audio: Audio, path: SavePath, extension: str, quality: str = "") -> NodeResult:
    saved = []
    metadata = metadata_texts(context)
    for number, waveform in enumerate(audio["waveform"]):
        file, entry = path.next_file(extension, number)
        _write(file, waveform, audio["sample_rate"], extension, quality, metadata)
        saved.append(entry)
    return NodeResult(ui={"audio": saved})


def _write(
    file: Path, waveform: FloatArray, sample_rate: int, extension: str, quality: str, metadata: dict[str, str]
) -> None:
    import av

    frame = audio_frame(waveform, sample_rate)
    rate = _opus_rate(sample_rate) if extension == "opus" else sample_rate
    with av.open(str(file), mode="w", format=extension) as container:
        container.metadata.update(metadata)
        stream: Any = container.add_stream(_ENCODERS[extension], rate=rate, layout=frame.layout.name)
        if quality == "V0":
            stream.codec_context.qscale = True
        elif quality:
            stream.bit_rate = int(quality.removesuffix("k")) * 1000
        encode_audio(container, stream, frame)


def _opus_rate(sample_rate: int) -> int:
    """Return the lowest rate of Opus that loses nothing, or its highest."""
    return next((rate for rate in _OPUS_RATES if rate >= sample_rate), _OPUS_RATES[-1])


def audio_frame(waveform: FloatArray, sample_rate: int) -> Any:
    """Return a PyAV frame of samples of shape (channels, samples): mono for one channel, otherwise stereo."""
    import av

    layout = "mono" if waveform.shape[0] == 1 else "stereo"
    interleaved = np.ascontiguousarray(waveform.T.reshape(1, -1), dtype=np.float32)
    frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
    frame.sample_rate = sample_rate
    frame.pts = 0
    return frame


def encode_audio(container: Any, stream: Any, frame: Any) -> None:
    """Encode a whole track into a container; PyAV converts it to the rate and format of the encoder."""
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
