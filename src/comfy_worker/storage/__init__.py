"""Where outputs go: into the response, a bucket, or a folder that somebody serves."""

from comfy_worker.storage.base import DeliverableFile, Storage
from comfy_worker.storage.content import Content, InMemory, OnDisk, Watched, read_all
from comfy_worker.storage.factory import StorageFactory

__all__ = [
    "Content",
    "DeliverableFile",
    "InMemory",
    "OnDisk",
    "Storage",
    "StorageFactory",
    "Watched",
    "read_all",
]
