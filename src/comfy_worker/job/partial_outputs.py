"""What a job had made when it failed: found and delivered beside the failure, in a bounded time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.comfy.protocol import PromptProtocol, WebsocketImage
from comfy_worker.errors import Cancelled, WorkerError
from comfy_worker.job.outputs import deliver_each, find_outputs
from comfy_worker.job.stage_limits import StageLimits
from comfy_worker.stop import Stop
from comfy_worker.storage import Storage
from comfy_worker.types import Artifact, Job, OutputText

log = logging.getLogger(__name__)

_GRACE_S = 30.0
"""How long the end of a failed job may wait for what it had made."""
_AWAY = "ComfyUI does not answer any more"


@dataclass
class Made:
    """What the nodes of a job's attempts reported and sent; of each node, what its last attempt did.

    Attributes:
        outputs: by node.
        images: that came over the websocket and are nowhere else.
    """

    outputs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    images: list[WebsocketImage] = field(default_factory=list)

    def add(self, attempt: PromptProtocol) -> None:
        """Take in what was heard of an attempt."""
        self.outputs.update(attempt.outputs)
        sent_again = {image.node_id for image in attempt.images}
        self.images = [*(image for image in self.images if image.node_id not in sent_again), *attempt.images]


@dataclass(frozen=True)
class Leftovers:
    """What could be delivered, and a sentence for each file that could not."""

    artifacts: Sequence[Artifact]
    texts: Sequence[OutputText]
    warnings: Sequence[str]


def deliver_leftovers(
    job: Job, made: Made, client: ComfyClient, storage: Storage, stop: Stop, turns: StageLimits
) -> Leftovers | None:
    """Deliver what a job had made that failed; None if that was nothing, or if nobody waits for it.

    Nobody waits for a job that its caller cancelled, but for one whose time is up. No file's failure is raised.

    Raises:
        Cancelled: the job was cancelled while it waited for its turn.
    """
    if stop.is_set() and not stop.is_late:
        return None
    found = find_outputs(made.outputs, made.images, job.workflow, include_previews=job.include_previews)
    if not found.files:
        return Leftovers((), found.texts, ()) if found.texts else None
    with _grace(stop) as grace:
        # Files on a disk that is in reach are there without ComfyUI, others may be again with it.
        is_in_reach = client.disk is not None or _is_back(client, grace)
        at_hand = [file for file in found.files if is_in_reach or file in found.received]
        # A node that sent nothing had not run: the failure is why.
        with _turn(stop, turns):
            artifacts, _failures, warnings = deliver_each(
                job, replace(found, files=tuple(at_hand), lost=()), client, storage, grace
            )
    warnings += [f"Output {file.filename}: {_AWAY}" for file in found.files if file not in at_hand]
    return Leftovers(artifacts, found.texts, warnings)


@contextmanager
def _turn(stop: Stop, turns: StageLimits) -> Iterator[None]:
    """Wait for the job's turn; one whose time is up, now or meanwhile, does not wait."""
    with ExitStack() as stack:
        try:
            if not stop.is_set():
                stack.enter_context(turns.delivering())
        except Cancelled:
            if not stop.is_late:
                raise
        yield


def _is_back(client: ComfyClient, grace: Stop) -> bool:
    """Wait for a ComfyUI that may have died; return whether it answers."""
    try:
        client.wait_until_ready(grace)
    except WorkerError as error:
        log.info("what a failed job had made stays in ComfyUI: %s", error)
        return False
    return True


class _Grace(Stop):
    """Says that there was no time left, in place of that the job was cancelled."""

    def check(self) -> None:
        if self.is_set():
            raise Cancelled("there was no time left to deliver it")


@contextmanager
def _grace(stop: Stop) -> Iterator[Stop]:
    """Yield a stop that is set when the time is up, or when the job is cancelled meanwhile."""
    grace = _Grace()
    timer = threading.Timer(_GRACE_S, grace.set)
    timer.daemon = True
    timer.start()
    try:
        with stop.waking(lambda: None if stop.is_late else grace.set()):
            yield grace
    finally:
        timer.cancel()
