"""Finds every output of a prompt and hands it over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.comfy.protocol import NodeOutputs, WebsocketImage
from comfy_worker.errors import OutputMissing, OutputTooLarge, WorkerError
from comfy_worker.jobs import Artifact, Job, Kind, OutputFile, OutputText, Workflow
from comfy_worker.media import inspect, kind_of
from comfy_worker.stop import Stop
from comfy_worker.storage import Parcel, Storage
from comfy_worker.workflow import WEBSOCKET_OUTPUT_NODE, class_type, nodes_of_class, title

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


def deliver_outputs(
    job: Job, found: Found, client: ComfyClient, storage: Storage, stop: Stop
) -> tuple[list[Artifact], list[str]]:
    """Fetch every file from ComfyUI and hand it to the storage, several at a time.

    Returns:
        What was delivered, and a warning for each file that could not be.

    Raises:
        OutputTooLarge: they do not fit into the answer; a part of them would be no result.
        WorkerError: there were files and none could be delivered; the first one's failure.
    """
    delivery = _Delivery(job, client, storage, found, stop)
    pending: list[tuple[OutputFile, Future[Artifact]]] = [
        (file, client.transfers.submit(delivery.deliver, file, path))
        for file, path in zip(found.files, _paths(found.files, job.prompt_id), strict=True)
    ]
    artifacts, failures = [], []
    for file, artifact in pending:
        try:
            artifacts.append(artifact.result())
        except WorkerError as error:
            failures.append((file, error))
    for _file, failure in failures:
        if isinstance(failure, OutputTooLarge):
            raise failure
    if failures and not artifacts:
        raise failures[0][1]
    if not artifacts and found.lost:
        raise OutputMissing("; ".join(found.lost))
    return artifacts, [*found.lost, *(f"Output {file.filename}: {failure.message}" for file, failure in failures)]


@dataclass(frozen=True)
class _Delivery:
    job: Job
    client: ComfyClient
    storage: Storage
    found: Found
    stop: Stop

    def deliver(self, file: OutputFile, path: str) -> Artifact:
        content = self._content(file)
        media = inspect(file.filename, content)
        parcel = Parcel(job_id=self.job.id, path=path, mime_type=media.mime_type, content=content)
        return Artifact(
            file=file,
            folder=_folder(file, self.job.prompt_id),
            delivered=self.storage.deliver(parcel),
            mime_type=media.mime_type,
            size_bytes=len(content),
            width=media.width,
            height=media.height,
        )

    def _content(self, file: OutputFile) -> bytes:
        received = self.found.received.get(file)
        if received is not None:
            return received
        # A ComfyUI that died meanwhile still has its files when it is back.
        return self.client.patiently(lambda: self.client.view(file), self.stop)


def _paths(files: Sequence[OutputFile], prompt_id: str) -> list[str]:
    """Return a path for each file that no other file of the job has."""
    paths: list[str] = []
    for file in files:
        folder = _folder(file, prompt_id)
        path = f"{folder}/{file.filename}" if folder else file.filename
        if path in paths:
            path = f"node_{file.node_id.replace(':', '-')}_{file.index}/{path}"
        paths.append(path)
    return paths


def _folder(file: OutputFile, prompt_id: str) -> str:
    """Return the file's folder as its author knows it: without the job's own in front."""
    if file.subfolder == prompt_id:
        return ""
    return file.subfolder.removeprefix(f"{prompt_id}/")
