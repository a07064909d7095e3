"""Delivers what a job had made before it failed, within a limited time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.comfy.protocol import PromptProtocol, WebsocketImage
from comfy_worker.errors import Cancelled, WorkerError
from comfy_worker.job.outputs import DeliveredOutputs, deliver_files, find_outputs
from comfy_worker.job.stage_limits import StageLimits
from comfy_worker.stop import Stop, call_after
from comfy_worker.storage import Storage
from comfy_worker.types import Job

log = logging.getLogger(__name__)

_DELIVERY_TIMEOUT_S = 30.0


@dataclass
class ReportedOutputs:
    """What the nodes of all attempts of a job reported; of each node, what its last attempt reported.

    Attributes:
        outputs: by node id.
        images: images that came over the websocket and exist nowhere else.
    """

    outputs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    images: list[WebsocketImage] = field(default_factory=list)

    def add(self, attempt: PromptProtocol) -> None:
        """Add what an attempt reported."""
        self.outputs.update(attempt.outputs)
        sent_again = {image.node_id for image in attempt.images}
        self.images = [*(image for image in self.images if image.node_id not in sent_again), *attempt.images]


def deliver_partial_outputs(
    job: Job, reported: ReportedOutputs, client: ComfyClient, storage: Storage, stop: Stop, limits: StageLimits
) -> DeliveredOutputs | None:
    """Deliver what a failed job had made; None if that was nothing, or if the job was cancelled by its caller.

    Raises:
        Cancelled: the job was cancelled while it waited for its delivery to begin.
    """
    if stop.is_set() and not stop.is_late:
        return None
    found = find_outputs(reported.outputs, reported.images, job.workflow, include_previews=job.include_previews)
    if not found.files:
        return DeliveredOutputs((), found.texts, ()) if found.texts else None
    delivery_stop = _DeliveryStop()
    with (
        call_after(_DELIVERY_TIMEOUT_S, delivery_stop.set),
        stop.calling(lambda: None if stop.is_late else delivery_stop.set()),
    ):
        # Files on a disk that the worker can read do not need ComfyUI.
        can_read = client.disk is not None or _is_ready(client, delivery_stop)
        readable = tuple(file for file in found.files if can_read or file in found.received)
        with _delivery_slot(stop, limits):
            # Missing websocket images are not worth a warning: their nodes did not run.
            delivered = deliver_files(job, replace(found, files=readable, lost=()), client, storage, delivery_stop)
    unreadable = [file.filename for file in found.files if file not in readable]
    warnings = [f"Output {name}: ComfyUI does not answer any more" for name in unreadable]
    return replace(delivered, warnings=[*delivered.warnings, *warnings])


@contextmanager
def _delivery_slot(stop: Stop, limits: StageLimits) -> Iterator[None]:
    """Wait until the job may deliver; a job whose time is up, before or meanwhile, does not wait."""
    with ExitStack() as stack:
        try:
            if not stop.is_set():
                stack.enter_context(limits.delivering())
        except Cancelled:
            if not stop.is_late:
                raise
        yield


def _is_ready(client: ComfyClient, stop: Stop) -> bool:
    """Wait for a ComfyUI that may have died; return whether it answers."""
    try:
        client.wait_until_ready(stop)
    except WorkerError as error:
        log.info("partial outputs of a failed job cannot be read from ComfyUI: %s", error)
        return False
    return True


class _DeliveryStop(Stop):
    """Says that the time is up instead of that the job was cancelled."""

    def check(self) -> None:
        if self.is_set():
            raise Cancelled("there was no time left to deliver it")
