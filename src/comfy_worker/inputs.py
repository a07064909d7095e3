"""Stages a job's files where the workflow's nodes find them."""

from __future__ import annotations

from concurrent.futures import Future

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import ComfyUnreachable, UploadFailed
from comfy_worker.jobs import InputFile, Job
from comfy_worker.stop import Stop
from comfy_worker.workflow import Graph, refer_to_staged

_UPLOAD_FLAGS = ("image_upload", "audio_upload", "video_upload", "file_upload", "animated_image_upload", "upload")
"""Options by which a node class says that an input names a file of the input folder."""


def stage_inputs(job: Job, graph: Graph, client: ComfyClient, stop: Stop) -> list[str]:
    """Upload the job's files into its own folder and let the graph refer to them there, in place.

    Returns:
        A warning for each file that no node loads.

    Raises:
        UploadFailed: ComfyUI did not take one or more of them; the sentence names each.
    """
    if not job.files:
        return []
    staged = _upload_all(job, client, stop)
    used = refer_to_staged(graph, staged, lambda class_type, name: loads_file(client, class_type, name))
    return [f"Image {name!r} is not used: no node of the workflow loads it" for name in staged if name not in used]


def _upload_all(job: Job, client: ComfyClient, stop: Stop) -> dict[str, str]:
    """Return the name of each file in ComfyUI's input folder, by the caller's name."""
    stop.check()
    uploads: list[tuple[InputFile, Future[str]]] = [
        (file, client.transfers.submit(_upload, file, job, client, stop)) for file in job.files
    ]
    staged, failures = {}, []
    for file, upload in uploads:
        try:
            staged[file.name] = upload.result()
        except (UploadFailed, ComfyUnreachable) as error:
            failures.append(error.message)
    if failures:
        raise UploadFailed(f"Failed to upload one or more input images: {'; '.join(failures)}")
    return staged


def _upload(file: InputFile, job: Job, client: ComfyClient, stop: Stop) -> str:
    # The same file under the same name may be sent twice.
    return client.patiently(lambda: client.upload(file.name, file.content, job.prompt_id), stop)


def loads_file(client: ComfyClient, class_type: str, input_name: str) -> bool:
    """Return whether a node loads a file of the input folder by this input.

    A node says so with a flag; one that says nothing may still offer the files as a list. A free text never counts,
    even when it reads like the name of a file.
    """
    config = client.node_inputs(class_type).get(input_name) or []
    options = config[1] if len(config) > 1 else {}
    is_combo = bool(config) and (isinstance(config[0], list) or config[0] == "COMBO")
    return is_combo or any(options.get(flag) for flag in _UPLOAD_FLAGS)
