"""Uploads a job's files to ComfyUI and makes the workflow refer to them.

For nodes that accept any file in the input folder, a file is uploaded into the job's own folder, `<prompt_id>/…`. Other
nodes accept only the files in their list, which has the files of one folder; for them the file is uploaded into that
folder as `<prompt_id>_…`. ComfyUI does not say which nodes these are, so every list input is treated as restricted
unless it is one of `_ANY_FOLDER` (`graph/node_inputs.py`).

Each step takes time in proportion to the workflow at most and can be stopped, since callers choose the workflow's size.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from typing import BinaryIO

from comfy_worker.comfy.client import TRANSFER_THREADS, ComfyClient
from comfy_worker.errors import (
    Cancelled,
    ComfyUnreachable,
    DiskFull,
    InputFetchFailed,
    InvalidInput,
    UploadFailed,
    WorkerError,
)
from comfy_worker.graph.file_references import Reference, find_strings, name_of_url, replace_references, shorten_name
from comfy_worker.graph.node_inputs import InputConfig
from comfy_worker.graph.workflow import Graph
from comfy_worker.job.input_files import UPLOAD_FAILED, decode_base64, too_many_files
from comfy_worker.media.file_type import content_mismatch, content_type, is_medium, with_true_extension
from comfy_worker.media.probe import HEAD_BYTES
from comfy_worker.net.fetcher import ContentFilter, Fetcher, UnwantedContent
from comfy_worker.stop import NO_DEADLINE, Deadline, Stop, call_after
from comfy_worker.storage.signed_urls import Signer
from comfy_worker.types import InputFile, Job

_MAX_NAME_LENGTH = 255
_MB = 1024 * 1024


@dataclass
class _Item:
    """A file that is fetched once, and uploaded to each folder where a node looks for it.

    Attributes:
        number: its index among the job's files.
        file: a file of the job, or one that a URL in the workflow names.
        folder: its folder below the job's own, for a URL of the workflow: two URLs may end in the same name.
        uses: each reference to the file, with the folder in whose list it must be, None for any folder.
        is_needed: a node certainly loads it, so the job fails without it.
    """

    number: int
    file: InputFile
    folder: str | None = None
    uses: list[tuple[Reference, str | None]] = field(default_factory=list)
    is_needed: bool = False

    @property
    def listings(self) -> set[str | None]:
        """The folders in whose lists it must be; None is the job's own folder, where each file of the job is."""
        own: set[str | None] = {None} if self.folder is None else set()
        return {listed for _reference, listed in self.uses} | own


@dataclass(frozen=True)
class _Staged:
    """The names of an uploaded file by the folder in whose list each is, or a warning; neither if it was not wanted."""

    names: Mapping[str | None, str] = field(default_factory=dict)
    warning: str | None = None


class _UnknownClass(Exception):
    """ComfyUI does not have a node's class, so it will refuse the workflow and say what is missing."""


def stage_inputs(
    job: Job, graph: Graph, client: ComfyClient, stop: Stop, deadline: Deadline = NO_DEADLINE
) -> list[str]:
    """Upload the job's files and those at the workflow's URLs, and make the graph refer to them, in place.

    Returns:
        A warning for each file that no node loads, and for each that is missing and may not be needed.

    Raises:
        InvalidInput: there are too many files, or one is too large or has other content than its name says.
        InputFetchFailed: one or more could not be fetched from their URLs.
        UploadFailed: ComfyUI did not accept one or more of them. In all three cases the sentence names each.
        DiskFull: ComfyUI's disk is too full for one.
        TimedOut: the deadline has passed.
    """
    return _Staging(job, graph, client, stop, deadline).run()


class _Staging:
    def __init__(self, job: Job, graph: Graph, client: ComfyClient, stop: Stop, deadline: Deadline) -> None:
        self._job = job
        self._graph = graph
        self._client = client
        self._stop = stop
        self._deadline = deadline
        # Set as soon as one file fails: the machine is paid for while the others are fetched.
        self._abort = Stop()
        self._max_files = client.settings.input_max_files
        self._signer = Signer(job.bucket, client.settings)
        self._fetcher = Fetcher(client.settings, self._signer.sign)
        self._configs: dict[tuple[str, str], InputConfig] = {}
        self._items = {file.name: _Item(number, file) for number, file in enumerate(job.files)}
        self._folders = {folder for file in job.files for folder in _folders_of(file.name)}
        self._folder_uses: list[Reference] = []
        self._new_folders = (name for name in map("url{}".format, itertools.count(1)) if name not in self._folders)

    def run(self) -> list[str]:
        if len(self._job.files) > self._max_files:
            raise InvalidInput(too_many_files(len(self._job.files), self._max_files))
        seconds = self._deadline.at - time.monotonic()
        with call_after(seconds, self._abort.set), self._stop.calling(self._abort.set):
            try:
                self._find_uses()
                return self._stage_all()
            except _UnknownClass:
                return []
            except Cancelled:
                self._check()
                raise

    def _check(self) -> None:
        self._stop.check()
        self._deadline.check()

    # ---------------------------------------------------------------------------------------- references

    def _find_uses(self) -> None:
        for reference in find_strings(self._graph):
            self._abort.check()
            if reference.is_url:
                self._use_url(reference)
            elif reference.name in self._items and self._config(reference).loads_name(reference):
                self._use(self._items[reference.name], reference, is_needed=True)
            elif reference.value.strip("/") in self._folders and self._config(reference).is_combo:
                self._folder_uses.append(reference)
        used_folders = {reference.value.strip("/") for reference in self._folder_uses}
        for item in self._items.values():
            item.is_needed = item.is_needed or not used_folders.isdisjoint(_folders_of(item.file.name))

    def _use_url(self, reference: Reference) -> None:
        config = self._config(reference)
        is_needed = config.loads_url(reference)
        if is_needed or config.may_load_url(reference):
            self._use(self._item_of_url(reference), reference, is_needed=is_needed)

    def _use(self, item: _Item, reference: Reference, *, is_needed: bool) -> None:
        item.uses.append((reference, self._config(reference).listed_in))
        item.is_needed = item.is_needed or is_needed

    def _item_of_url(self, reference: Reference) -> _Item:
        """Return the item for a URL in the workflow; equal URLs are one item."""
        known = self._items.get(reference.name)
        if known is None:
            if len(self._items) == self._max_files:
                raise InvalidInput(too_many_files(f"more than {self._max_files}", self._max_files))
            known = _Item(len(self._items), _file_of_url(reference), next(self._new_folders))
            self._items[reference.name] = known
        return known

    def _config(self, reference: Reference) -> InputConfig:
        key = (reference.class_type, reference.input_name)
        config = self._configs.get(key)
        if config is None:
            inputs = self._client.retrying(lambda: self._client.node_inputs(reference.class_type), self._abort)
            if inputs is None:
                raise _UnknownClass
            config = self._configs[key] = InputConfig.of(*key, inputs.get(reference.input_name))
        return config

    # -------------------------------------------------------------------------------------------- transfer

    def _stage_all(self) -> list[str]:
        """Upload all files and write their names into the graph; return warnings."""
        items = list(self._items.values())
        if not items:
            return []
        # These threads are the job's own, so that slow servers do not delay other jobs.
        count = min(TRANSFER_THREADS, len(items))
        with closing(self._signer), ThreadPoolExecutor(count, thread_name_prefix="staging") as threads:
            stagings = [threads.submit(self._stage, item) for item in items]
            # No upload may still be running when the job's folder is removed.
            wait(stagings)
        failures = [error for error in (staging.exception() for staging in stagings) if isinstance(error, WorkerError)]
        self._check()
        if failures:
            raise _merged([failure for failure in failures if not isinstance(failure, Cancelled)] or failures)
        staged = [staging.result() for staging in stagings]
        names = [
            (reference, one.names[listed])
            for item, one in zip(items, staged, strict=True)
            for reference, listed in item.uses
            if one.names
        ]
        folders = [(use, f"{self._job.prompt_id}/{use.value.strip('/')}") for use in self._folder_uses]
        replace_references(self._graph, names + folders)
        return [one.warning for one in staged if one.warning is not None]

    def _stage(self, item: _Item) -> _Staged:
        try:
            names = self._upload_all(item)
        except UnwantedContent:
            # A URL in a text may lead to a web page: the text is left unchanged.
            return _Staged()
        except (InvalidInput, InputFetchFailed, UploadFailed, DiskFull) as error:
            if not item.is_needed and not isinstance(error, DiskFull):
                return _Staged(warning=f"{_warning_prefix(item)}: {error.message}")
            if not isinstance(error, UploadFailed):
                self._abort.set()
            raise
        unused = f"Image {item.file.name!r} is not used: no node of the workflow loads it"
        return _Staged(names, None if item.uses or item.is_needed else unused)

    def _upload_all(self, item: _Item) -> Mapping[str | None, str]:
        self._abort.check()
        with self._open(item) as content:
            head = content.read(HEAD_BYTES)
            name = self._checked_name(item, head)
            return {listed: self._upload(content, name, head, item, listed) for listed in item.listings}

    def _open(self, item: _Item) -> BinaryIO:
        file = item.file
        if file.url is not None:
            # A URL in a text may lead to a web page; only media are fetched.
            content_filter = None if item.is_needed or item.folder is None else _media_filter(file.name)
            return self._fetcher.fetch(file.url, self._abort, content_filter)
        content = file.content or b""
        limit_mb = self._client.settings.input_max_mb
        if len(content) > limit_mb * _MB:
            raise InvalidInput(f"Image {file.name!r} is larger than an input may be, {limit_mb:g} MB")
        return io.BytesIO(content)

    @staticmethod
    def _checked_name(item: _Item, head: bytes) -> str:
        """Return the file's name in the job's folder; a name taken from a URL gets the right extension."""
        name = item.file.name if item.folder is None else with_true_extension(item.file.name, head)
        actual = content_mismatch(head, name)
        if actual:
            raise InvalidInput(f"Image {name!r} is {actual}, which does not match its extension")
        return name if item.folder is None else f"{item.folder}/{name}"

    def _upload(self, content: BinaryIO, name: str, head: bytes, item: _Item, listed: str | None) -> str:
        prompt_id = self._job.prompt_id
        if listed is None:
            subfolder, _, filename = f"{prompt_id}/{name}".rpartition("/")
        else:
            # This name is unique among all jobs.
            prefix = f"{prompt_id}_{item.number}_"
            subfolder, filename = listed, prefix + shorten_name(name.replace("/", "_"), _MAX_NAME_LENGTH - len(prefix))
        self._abort.check()
        try:
            return self._client.retrying(
                lambda: self._client.upload(content, filename, subfolder, content_type(head, name)), self._abort
            )
        except UploadFailed as error:
            raise UploadFailed(f"{item.file.name}: {error.message}") from error


def _file_of_url(reference: Reference) -> InputFile:
    name = name_of_url(reference.name)
    if reference.name[:5].lower() == "data:":
        try:
            return InputFile(name, decode_base64(reference.name, f"node {reference.node_id}"))
        except InvalidInput as error:
            raise InvalidInput(f"{UPLOAD_FAILED}: {error.message}") from None
    return InputFile(name, url=reference.name)


def _folders_of(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _media_filter(name: str) -> ContentFilter:
    return lambda head, content_type: is_medium(head, name, content_type)


def _warning_prefix(item: _Item) -> str:
    if item.folder is None:
        return f"Unused image {item.file.name!r} is missing"
    reference = item.uses[0][0]
    return f"Node {reference.node_id} ({reference.input_name}): the URL was left unchanged"


def _merged(failures: list[WorkerError]) -> WorkerError:
    """Return one error for several: the caller's mistakes first; its message lists every failure of that kind."""
    for kind in (InvalidInput, InputFetchFailed, DiskFull):
        same = [failure for failure in failures if isinstance(failure, kind)]
        if same:
            return kind(_sentence(same), hint=same[0].hint)
    refused = [failure for failure in failures if isinstance(failure, (UploadFailed, ComfyUnreachable))]
    return UploadFailed(_sentence(refused)) if refused else failures[0]


def _sentence(failures: Sequence[WorkerError]) -> str:
    return f"{UPLOAD_FAILED}: {'; '.join(dict.fromkeys(failure.message for failure in failures))}"
