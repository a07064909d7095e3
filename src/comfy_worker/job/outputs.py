"""Finds every output of a prompt and hands it over."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from typing import Any

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.comfy.output_reader import content_of
from comfy_worker.comfy.protocol import NodeOutputs, WebsocketImage
from comfy_worker.errors import Cancelled, OutputMissing, OutputTooLarge, WorkerError
from comfy_worker.graph.workflow import WEBSOCKET_OUTPUT_NODE, class_type, nodes_of_class, title
from comfy_worker.media.convert import ConversionFailed, convert
from comfy_worker.media.metadata import WRITTEN_INTO, without_metadata
from comfy_worker.media.probe import Media, inspect, kind_of
from comfy_worker.stop import Stop
from comfy_worker.storage import Content, DeliverableFile, InMemory, Storage, Watched, read_all
from comfy_worker.storage.object_keys import safe_name, safe_path
from comfy_worker.types import Artifact, Job, Kind, OutputFile, OutputText, Workflow

_WEBSOCKET = "websocket"


@dataclass(frozen=True)
class Found:
    """What a prompt left: files, texts, and the contents of those files that only the websocket had."""

    files: tuple[OutputFile, ...]
    texts: tuple[OutputText, ...]
    received: Mapping[OutputFile, bytes] = field(default_factory=dict, repr=False)
    lost: tuple[str, ...] = ()
    """A sentence for each node whose pictures came too late or never."""


def find_outputs(
    outputs: NodeOutputs, images: Sequence[WebsocketImage], workflow: Workflow, *, include_previews: bool
) -> Found:
    """Return everything that the nodes reported, under whatever key, in the order of the workflow's nodes."""
    order = {node_id: place for place, node_id in enumerate(workflow)}
    node_ids = sorted(outputs, key=lambda node_id: order.get(node_id, len(order)))
    reported = [file for node_id in node_ids for file in _files(node_id, outputs[node_id], workflow)]
    wanted = ("output", "temp") if include_previews else ("output",)
    received = _websocket_files(images, workflow)
    return Found(
        files=(*(file for file in reported if file.type in wanted), *received),
        texts=tuple(text for node_id in node_ids for text in _texts(node_id, outputs[node_id], workflow)),
        received=received,
        lost=tuple(_lost(received, workflow)),
    )


def _files(node_id: str, reported: Mapping[str, Any], workflow: Workflow) -> Iterator[OutputFile]:
    """Yield a node's files: every `{filename, subfolder, type}` in every list; the same file only once."""
    seen: set[tuple[str, str, str]] = set()
    for key, items in reported.items():
        for item in items if isinstance(items, list) else ():
            if not isinstance(item, Mapping) or not item.get("filename"):
                continue
            filename = str(item["filename"])
            place = (str(item.get("type") or "output"), str(item.get("subfolder") or ""), filename)
            if place in seen:
                continue
            yield OutputFile(
                filename=filename,
                subfolder=place[1],
                type=place[0],
                # What ComfyUI itself calls images stays there, its videos too: the MIME type tells.
                kind=Kind.IMAGE if key == "images" else kind_of(filename),
                node_id=node_id,
                class_type=class_type(workflow, node_id),
                title=title(workflow, node_id),
                index=len(seen),
            )
            seen.add(place)


def _texts(node_id: str, reported: Mapping[str, Any], workflow: Workflow) -> Iterator[OutputText]:
    for items in reported.values():
        for item in items if isinstance(items, list) else ():
            if isinstance(item, str):
                yield OutputText(node_id, class_type(workflow, node_id), title(workflow, node_id), item)


def _websocket_files(images: Sequence[WebsocketImage], workflow: Workflow) -> dict[OutputFile, bytes]:
    """Return the pictures that came as frames as files with a name, and their contents."""
    files: dict[OutputFile, bytes] = {}
    counts: dict[str, int] = {}
    for image in images:
        index = counts.get(image.node_id, 0)
        counts[image.node_id] = index + 1
        extension = image.mime_type.partition("/")[2]
        file = OutputFile(
            filename=f"websocket_{image.node_id.replace(':', '-')}_{index + 1:05}_.{extension}",
            subfolder="",
            type=_WEBSOCKET,
            kind=Kind.IMAGE,
            node_id=image.node_id,
            class_type=class_type(workflow, image.node_id),
            title=title(workflow, image.node_id),
            index=index,
        )
        files[file] = image.content
    return files


def _lost(received: Iterable[OutputFile], workflow: Workflow) -> Iterator[str]:
    heard_from = {file.node_id for file in received}
    for node_id in nodes_of_class(workflow, WEBSOCKET_OUTPUT_NODE):
        if node_id not in heard_from:
            yield (
                f"Node {node_id} ({WEBSOCKET_OUTPUT_NODE}): its pictures were lost with the websocket; "
                "a SaveImage node keeps them"
            )


# ----------------------------------------------------------------------------------------------- delivery


@dataclass(frozen=True)
class DeliveredOutputs:
    """What became of the outputs of a prompt.

    Attributes:
        artifacts: the delivered files.
        texts: the texts that nodes reported.
        warnings: a sentence for each file that could not be delivered, or not as the job asked for.
        failures: the errors of the files that could not be delivered.
    """

    artifacts: Sequence[Artifact]
    texts: Sequence[OutputText]
    warnings: Sequence[str]
    failures: Sequence[WorkerError] = ()


def deliver_outputs(job: Job, found: Found, client: ComfyClient, storage: Storage, stop: Stop) -> DeliveredOutputs:
    """Deliver the outputs of a prompt that succeeded.

    Raises:
        OutputTooLarge: they do not fit into the response; a part of them would be no result.
        Cancelled: the job was cancelled meanwhile.
        WorkerError: there were files and none could be delivered; the error of the first one.
    """
    delivered = deliver_files(job, found, client, storage, stop)
    for failure in delivered.failures:
        if isinstance(failure, (OutputTooLarge, Cancelled)):
            raise failure
    if delivered.artifacts:
        return delivered
    if delivered.failures:
        raise delivered.failures[0]
    if found.lost:
        raise OutputMissing("; ".join(found.lost))
    return delivered


def deliver_files(job: Job, found: Found, client: ComfyClient, storage: Storage, stop: Stop) -> DeliveredOutputs:
    """Hand every file to the storage, several at a time; what fails is returned, not raised."""
    delivery = _Delivery(job, client, storage, found, stop)
    pending = [
        client.transfers.submit(delivery.deliver, file, path)
        for file, path in zip(found.files, _paths(found.files, job.prompt_id), strict=True)
    ]
    # No transfer may still be running when the job's folder is removed.
    wait(pending)
    artifacts, failures, warnings = [], [], list(found.lost)
    for file, future in zip(found.files, pending, strict=True):
        try:
            artifact, notes = future.result()
        except WorkerError as error:
            failures.append(error)
            warnings.append(f"Output {file.filename}: {error.message}")
        else:
            artifacts.append(artifact)
            warnings += notes
    return DeliveredOutputs(artifacts, found.texts, warnings, failures)


@dataclass(frozen=True)
class _Item:
    """One file on its way: where it goes, what it is, and what there is to say about it."""

    file: OutputFile
    path: str
    content: Content
    media: Media
    notes: tuple[str, ...] = ()


class _Delivery:
    """One job's files on their way to the storage, from several threads."""

    def __init__(self, job: Job, client: ComfyClient, storage: Storage, found: Found, stop: Stop) -> None:
        self._job = job
        self._client = client
        self._storage = storage
        self._received = found.received
        self._stop = stop
        wish = job.conversion.keep_metadata if job.conversion else None
        self._keeps_metadata = client.settings.keep_metadata if wish is None else wish
        self._lock = threading.Lock()
        self._owners = dict(zip(_paths(found.files, job.prompt_id), found.files, strict=True))

    def deliver(self, file: OutputFile, path: str) -> tuple[Artifact, tuple[str, ...]]:
        """Return the delivered file, and what there is to say about it."""
        self._stop.check()
        # A ComfyUI that died meanwhile still has its files when it is back.
        return self._client.retrying(lambda: self._deliver(file, path), self._stop)

    def _deliver(self, file: OutputFile, path: str) -> tuple[Artifact, tuple[str, ...]]:
        try:
            return self._deliver_readable(file, path)
        except OSError as error:
            raise OutputMissing(f"{file.filename} could not be read: {error.strerror}") from error

    def _deliver_readable(self, file: OutputFile, path: str) -> tuple[Artifact, tuple[str, ...]]:
        received = self._received.get(file)
        content = content_of(file, self._client) if received is None else InMemory(received)
        item = self._converted(_Item(file, path, content, _look_at(file.filename, content)))
        deliverable = DeliverableFile(
            job_id=self._job.id,
            path=item.path,
            mime_type=item.media.mime_type,
            content=Watched(item.content, self._stop.check),
            node_id=file.node_id,
            index=file.index,
        )
        artifact = Artifact(
            file=item.file,
            folder=_folder(file, self._job.prompt_id),
            delivered=self._storage.deliver(deliverable),
            mime_type=item.media.mime_type,
            size_bytes=item.content.size,
            width=item.media.width,
            height=item.media.height,
            duration_s=item.media.duration_s,
        )
        return artifact, item.notes

    def _converted(self, item: _Item) -> _Item:
        """Return a picture as the job wants it; with its own pixels, and a warning, where that cannot be done."""
        name = item.file.filename
        if not item.media.mime_type.startswith("image/"):
            return item
        if self._job.conversion is None:
            return item if self._keeps_metadata else _bare(item)
        try:
            wish = replace(self._job.conversion, keep_metadata=self._keeps_metadata)
            converted = convert(read_all(item.content), name, wish)
        except ConversionFailed as error:
            left = item if self._keeps_metadata else _bare(item)
            return replace(left, notes=(f"Output {name} was not converted: {error}",))
        content = InMemory(converted.content)
        return _Item(
            file=replace(item.file, filename=converted.filename),
            path=item.path if converted.filename == name else self._renamed(item, converted.filename),
            content=content,
            media=_look_at(converted.filename, content),
            notes=(f"Output {name}: {converted.note}",) if converted.note else (),
        )

    def _renamed(self, item: _Item, filename: str) -> str:
        """Return the path for a file that got another extension, under which another may lie already."""
        folder, slash, _old = item.path.rpartition("/")
        path = f"{folder}{slash}{safe_path(filename)}"
        with self._lock:
            owner = self._owners.setdefault(path, item.file)
        return path if owner == item.file else f"{_apart(item.file)}/{path}"


def _bare(item: _Item) -> _Item:
    """Return a picture without metadata."""
    if item.media.mime_type not in WRITTEN_INTO:
        return item
    content = read_all(item.content)
    bare = without_metadata(content)
    return item if bare is content else replace(item, content=InMemory(bare))


def _look_at(filename: str, content: Content) -> Media:
    with content.open() as opened:
        return inspect(filename, opened)


def _paths(files: Sequence[OutputFile], prompt_id: str) -> list[str]:
    """Return a path for each file that no other file of the job has, and that does not lead out of its folder."""
    paths: list[str] = []
    for file in files:
        path = safe_path(f"{_folder(file, prompt_id)}/{file.filename}")
        if path in paths:
            path = f"{_apart(file)}/{path}"
        paths.append(path)
    return paths


def _apart(file: OutputFile) -> str:
    """Return a folder for a file whose name another file of the job has too."""
    return f"node_{safe_name(file.node_id)}_{file.index}"


def _folder(file: OutputFile, prompt_id: str) -> str:
    """Return the file's folder as its author knows it: without the job's own in front."""
    if file.subfolder == prompt_id:
        return ""
    return file.subfolder.removeprefix(f"{prompt_id}/")
