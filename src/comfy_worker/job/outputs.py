"""Finds the outputs of a prompt and delivers them to a storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from typing import Any

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.comfy.output_reader import output_content
from comfy_worker.comfy.protocol import NodeOutputs, WebsocketImage
from comfy_worker.errors import Cancelled, OutputMissing, OutputTooLarge, WorkerError
from comfy_worker.graph.workflow import WEBSOCKET_OUTPUT_NODE, node_names, nodes_of_class
from comfy_worker.media.convert import ConversionFailed, convert
from comfy_worker.media.metadata import WRITTEN_INTO, without_metadata
from comfy_worker.media.probe import Media, inspect, kind_of
from comfy_worker.stop import Stop
from comfy_worker.storage import Content, DeliverableFile, InMemory, Storage, Watched, read_all
from comfy_worker.storage.object_keys import safe_name, safe_path
from comfy_worker.types import Artifact, Job, Kind, OutputFile, OutputText, Workflow


@dataclass(frozen=True)
class FoundOutputs:
    """The outputs of a prompt.

    Attributes:
        files: files in ComfyUI, and websocket images.
        texts: what nodes reported as text.
        received: the contents of the websocket images.
        lost: a sentence for each node whose websocket images did not arrive.
    """

    files: tuple[OutputFile, ...]
    texts: tuple[OutputText, ...]
    received: Mapping[OutputFile, bytes] = field(default_factory=dict, repr=False)
    lost: tuple[str, ...] = ()


def find_outputs(
    outputs: NodeOutputs, images: Sequence[WebsocketImage], workflow: Workflow, *, include_previews: bool
) -> FoundOutputs:
    """Return everything that the nodes reported, under whatever key, in the order of the workflow's nodes."""
    order = {node_id: index for index, node_id in enumerate(workflow)}
    node_ids = sorted(outputs, key=lambda node_id: order.get(node_id, len(order)))
    reported = [file for node_id in node_ids for file in _files(node_id, outputs[node_id], workflow)]
    wanted = ("output", "temp") if include_previews else ("output",)
    received = _websocket_files(images, workflow)
    senders = {file.node_id for file in received}
    silent = [node_id for node_id in nodes_of_class(workflow, WEBSOCKET_OUTPUT_NODE) if node_id not in senders]
    return FoundOutputs(
        files=(*(file for file in reported if file.type in wanted), *received),
        texts=tuple(text for node_id in node_ids for text in _texts(node_id, outputs[node_id], workflow)),
        received=received,
        lost=tuple(
            f"Node {node_id} ({WEBSOCKET_OUTPUT_NODE}): its images were lost with the websocket; "
            "a SaveImage node keeps them"
            for node_id in silent
        ),
    )


def _files(node_id: str, reported: Mapping[str, Any], workflow: Workflow) -> Iterator[OutputFile]:
    """Yield a node's files, each once: every `{filename, subfolder, type}` in every list."""
    seen: set[tuple[str, str, str]] = set()
    for key, items in reported.items():
        for item in items if isinstance(items, list) else ():
            if not isinstance(item, Mapping) or not item.get("filename"):
                continue
            filename = str(item["filename"])
            file_type, subfolder = str(item.get("type") or "output"), str(item.get("subfolder") or "")
            if (file_type, subfolder, filename) in seen:
                continue
            yield OutputFile(
                filename=filename,
                subfolder=subfolder,
                type=file_type,
                # What ComfyUI calls images stays in that list, videos too; the MIME type tells them apart.
                kind=Kind.IMAGE if key == "images" else kind_of(filename),
                index=len(seen),
                **node_names(workflow, node_id),
            )
            seen.add((file_type, subfolder, filename))


def _texts(node_id: str, reported: Mapping[str, Any], workflow: Workflow) -> Iterator[OutputText]:
    for items in reported.values():
        for item in items if isinstance(items, list) else ():
            if isinstance(item, str):
                yield OutputText(text=item, **node_names(workflow, node_id))


def _websocket_files(images: Sequence[WebsocketImage], workflow: Workflow) -> dict[OutputFile, bytes]:
    """Return a file with a name for each websocket image, and its content."""
    files: dict[OutputFile, bytes] = {}
    counts: dict[str, int] = {}
    for image in images:
        index = counts.get(image.node_id, 0)
        counts[image.node_id] = index + 1
        extension = image.mime_type.partition("/")[2]
        file = OutputFile(
            filename=f"websocket_{image.node_id.replace(':', '-')}_{index + 1:05}_.{extension}",
            subfolder="",
            type="websocket",
            kind=Kind.IMAGE,
            index=index,
            **node_names(workflow, image.node_id),
        )
        files[file] = image.content
    return files


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


def deliver_outputs(
    job: Job, found: FoundOutputs, client: ComfyClient, storage: Storage, stop: Stop
) -> DeliveredOutputs:
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


def deliver_files(job: Job, found: FoundOutputs, client: ComfyClient, storage: Storage, stop: Stop) -> DeliveredOutputs:
    """Hand every file to the storage, several at a time; what fails is returned, not raised."""
    delivery = _Delivery(job, client, storage, found.received, stop)
    pending = [
        client.transfers.submit(delivery.deliver, file, path)
        for file, path in zip(found.files, _paths(found.files, job), strict=True)
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
    """One file, as it is to be delivered, with notes for the job's warnings."""

    file: OutputFile
    path: str
    content: Content
    media: Media
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Delivery:
    """Delivers one job's files; used by several threads."""

    job: Job
    client: ComfyClient
    storage: Storage
    received: Mapping[OutputFile, bytes]
    stop: Stop

    def deliver(self, file: OutputFile, path: str) -> tuple[Artifact, tuple[str, ...]]:
        """Return the delivered file, and notes for the job's warnings."""
        self.stop.check()
        try:
            # If ComfyUI dies meanwhile, it still has its files after the restart.
            return self.client.retrying(lambda: self._deliver(file, path), self.stop)
        except OSError as error:
            raise OutputMissing(f"{file.filename} could not be read: {error.strerror}") from error

    def _deliver(self, file: OutputFile, path: str) -> tuple[Artifact, tuple[str, ...]]:
        received = self.received.get(file)
        if received is not None:
            return self._deliver_content(file, path, InMemory(received))
        with output_content(file, self.client, self.stop.check) as content:
            return self._deliver_content(file, path, content)

    def _deliver_content(self, file: OutputFile, path: str, content: Content) -> tuple[Artifact, tuple[str, ...]]:
        item = self._converted(_Item(file, path, content, _inspect(file.filename, content)))
        delivered = self.storage.deliver(
            DeliverableFile(
                job_id=self.job.id,
                path=item.path,
                mime_type=item.media.mime_type,
                content=Watched(item.content, self.stop.check),
                node_id=file.node_id,
                index=file.index,
            )
        )
        artifact = Artifact(
            file=item.file,
            folder=_folder(file, self.job.prompt_id),
            delivered=delivered,
            mime_type=item.media.mime_type,
            size_bytes=item.content.size,
            width=item.media.width,
            height=item.media.height,
            duration_s=item.media.duration_s,
        )
        return artifact, item.notes

    def _converted(self, item: _Item) -> _Item:
        """Return an image as the job wants it; unchanged, with a note, if it cannot be converted."""
        if not item.media.mime_type.startswith("image/"):
            return item
        conversion = self.job.conversion
        wanted = conversion.keep_metadata if conversion else None
        keep_metadata = self.client.settings.keep_metadata if wanted is None else wanted
        if conversion is None:
            return item if keep_metadata else _without_metadata(item)
        name = item.file.filename
        try:
            converted = convert(read_all(item.content), name, replace(conversion, keep_metadata=keep_metadata))
        except ConversionFailed as error:
            unconverted = item if keep_metadata else _without_metadata(item)
            return replace(unconverted, notes=(f"Output {name} was not converted: {error}",))
        content = InMemory(converted.content)
        path = item.path
        if converted.filename != name:
            path = f"{path.rpartition('/')[0]}/{safe_path(converted.filename)}".lstrip("/")
        return _Item(
            file=replace(item.file, filename=converted.filename),
            path=path,
            content=content,
            media=_inspect(converted.filename, content),
            notes=(f"Output {name}: {converted.note}",) if converted.note else (),
        )


def _without_metadata(item: _Item) -> _Item:
    if item.media.mime_type not in WRITTEN_INTO:
        return item
    content = read_all(item.content)
    stripped = without_metadata(content)
    return item if stripped is content else replace(item, content=InMemory(stripped))


def _inspect(filename: str, content: Content) -> Media:
    with content.open() as file:
        return inspect(filename, file)


def _paths(files: Sequence[OutputFile], job: Job) -> list[str]:
    """Return a relative path for each file, different from those of the job's other files.

    Images that are converted must differ by more than their extension, which changes.
    """
    paths, taken = [], set()
    for file in files:
        path = safe_path(f"{_folder(file, job.prompt_id)}/{file.filename}")
        key = path.rpartition(".")[0] if job.conversion and file.kind is Kind.IMAGE else path
        if key in taken:
            path = f"node_{safe_name(file.node_id)}_{file.index}/{path}"
        taken.add(key)
        paths.append(path)
    return paths


def _folder(file: OutputFile, prompt_id: str) -> str:
    """Return the file's folder as the workflow names it, without the job's own folder in front."""
    if file.subfolder == prompt_id:
        return ""
    return file.subfolder.removeprefix(f"{prompt_id}/")
