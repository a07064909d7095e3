"""Where outputs go: one seam, an implementation a module."""

from comfy_worker.storage.base import Parcel, Storage
from comfy_worker.storage.content import Content, InMemory, OnDisk, Stream, Watched, read_all
from comfy_worker.storage.factory import Storages

__all__ = ["Content", "InMemory", "OnDisk", "Parcel", "Storage", "Storages", "Stream", "Watched", "read_all"]
