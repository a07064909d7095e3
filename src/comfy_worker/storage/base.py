"""The interface of a storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from comfy_worker.storage.content import Content
from comfy_worker.types import Delivered


@dataclass(frozen=True)
class DeliverableFile:
    """An output file that is to be delivered.

    Attributes:
        job_id: the caller's name for the job.
        path: the file's name, with its folder below the job's; unique in the job, and never leads out of its folder.
        mime_type: the type of the content.
        content: the bytes.
        node_id: the node that made the file.
        index: the file's index among that node's files.
    """

    job_id: str
    path: str
    mime_type: str
    content: Content
    node_id: str = ""
    index: int = 0


class Storage(Protocol):
    """Stores the files of one job; safe to use from several threads."""

    def deliver(self, file: DeliverableFile) -> Delivered:
        """Store a file and return where the caller finds it.

        Raises:
            DeliveryFailed: the file could not be stored.
            OutputTooLarge: the response has no space for the file, and there is no bucket.
            WorkerError: the content could not be read.
        """
