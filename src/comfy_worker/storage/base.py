"""What is handed to a storage, and what a storage is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from comfy_worker.storage.content import Content
from comfy_worker.types import Delivered


@dataclass(frozen=True)
class DeliverableFile:
    """A file to be delivered.

    Attributes:
        job_id: the door's name for the job.
        path: the file's name, with its folder below the job's own; unique in the job, and never leads out of it.
        mime_type: for whoever opens it.
        content: the bytes.
        node_id: of the node that made it.
        index: place among that node's files.
    """

    job_id: str
    path: str
    mime_type: str
    content: Content
    node_id: str = ""
    index: int = 0


class Storage(Protocol):
    """Takes the files of one job and says where the caller finds each; safe to use from several threads."""

    def deliver(self, parcel: DeliverableFile) -> Delivered:
        """Put the file there.

        Raises:
            DeliveryFailed: it could not be put there; the sentence says why.
            OutputTooLarge: it does not fit, and there is nowhere else.
            WorkerError: its content could not be read.
        """
