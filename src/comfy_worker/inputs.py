"""Stages a job's files where the workflow's nodes find them.

A file is uploaded into the job's own folder, `<prompt_id>/…`, wherever the node only asks whether the file is there.
Other nodes offer a list of files, and ComfyUI refuses what is not in it; these lists have the files of one folder, so
there the file lies under a name of its own, `<prompt_id>_…`. Which nodes these are cannot be asked, so every list
that is not known to take any file is taken for one of them.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.errors import (
    Cancelled,
    ComfyUnreachable,
    DiskFull,
    InputFetchFailed,
    InvalidInput,
    UploadFailed,
    WorkerError,
)
from comfy_worker.fetch import Fetcher
from comfy_worker.input_files import decode_base64
from comfy_worker.jobs import InputFile, Job
from comfy_worker.references import Reference, find_strings, name_of_url, refer, shortened
from comfy_worker.sniff import HEAD_BYTES, content_type, disguise, with_true_extension
from comfy_worker.stop import Stop
from comfy_worker.workflow import Graph

_UPLOAD_FLAGS = ("image_upload", "audio_upload", "video_upload", "file_upload", "animated_image_upload", "upload")
"""Options by which a node class says that an input names a file of the input folder."""
_FILE_TYPES = ("WEBCAM", "AUDIO_RECORD", "LOAD_3D", "LOAD_3D_ANIMATION")
"""Types of input that hold names of files which ComfyUI's page has uploaded."""
_ANY_FOLDER = {
    ("LoadImage", "image"),
    ("LoadImageMask", "image"),
    ("LoadImageOutput", "image"),
    ("LoadAudio", "audio"),
    ("LoadVideo", "file"),
    ("LoadLatent", "latent"),
}
"""ComfyUI's own inputs that offer a list and take any file of the input folder, in folders too (0.3.64 to 0.8.0)."""
_3D_FOLDER = "3d"
"""The folder that `Load3D` and its kin list, below the input folder."""
_MODEL_FILE = re.compile(r"\.(safetensors|sft|ckpt|pt|pt2|pth|bin|pkl|gguf|onnx)$", re.IGNORECASE)
_LONGEST_NAME = 255
_MB = 1024 * 1024


@dataclass
class _Item:
    """A file that is fetched once, and uploaded to each place where a node looks for it.

    Attributes:
        number: its place among the job's files.
        file: what the job brought, or a URL that stands in the workflow.
        folder: in the job's own, for a URL of the workflow: two of them may end in the same name.
        uses: each reference to the file with the folder whose list it must be in, None for any.
        in_own_folder: it is wanted there besides, by a node that loads the whole folder.
    """

    number: int
    file: InputFile
    folder: str | None = None
    uses: list[tuple[Reference, str | None]] = field(default_factory=list)
    in_own_folder: bool = False

    @property
    def is_used(self) -> bool:
        """Whether any node loads it."""
        return bool(self.uses) or self.in_own_folder


def stage_inputs(job: Job, graph: Graph, client: ComfyClient, stop: Stop) -> list[str]:
    """Upload the files that the graph loads and let the graph refer to them there, in place.

    Returns:
        A warning for each file that no node loads; it is neither fetched nor uploaded.

    Raises:
        InvalidInput: there are too many of them, or one is too large or no such file as its name says.
        InputFetchFailed: one or more could not be fetched from their URLs.
        UploadFailed: ComfyUI did not take one or more of them. In all three the sentence names each.
        DiskFull: there is no room for one.
    """
    return _Staging(job, graph, client, stop).run()


class _Staging:
    """One job's files on their way."""

    def __init__(self, job: Job, graph: Graph, client: ComfyClient, stop: Stop) -> None:
        self._job = job
        self._graph = graph
        self._client = client
        self._stop = stop
        # Whoever pays for the machine does not wait for the others when one file cannot be had.
        self._hurry = Stop()
        self._fetcher = Fetcher(client.settings, job.bucket)
        self._items = {file.name: _Item(number, file) for number, file in enumerate(job.files)}
        self._folders = {folder for file in job.files for folder in _folders_of(file.name)}

    def run(self) -> list[str]:
        folders = self._find_uses()
        self._check_count()
        items = [item for item in self._items.values() if item.is_used]
        self._stop.check()
        for item, places in zip(items, self._stage_all(items), strict=True):
            for reference, listed in item.uses:
                refer(self._graph, reference, places[listed])
        for reference in folders:
            refer(self._graph, reference, f"{self._job.prompt_id}/{reference.value.strip('/')}")
        unused = [item.file.name for item in self._items.values() if not item.is_used]
        return [f"Image {name!r} is not used: no node of the workflow loads it" for name in unused]

    # ---------------------------------------------------------------------------------------- references

    def _find_uses(self) -> list[Reference]:
        """Note who loads which file; return the references to whole folders."""
        folders = []
        for reference in find_strings(self._graph):
            if reference.is_url:
                if self._loads_url(reference):
                    self._item_of_url(reference).uses.append((reference, self._listed_in(reference)))
            elif reference.name in self._items and self._config(reference).loads_file:
                self._items[reference.name].uses.append((reference, self._listed_in(reference)))
            elif reference.value.strip("/") in self._folders and self._config(reference).is_combo:
                folders.append(reference)
                self._use_folder(reference.value.strip("/"))
        return folders

    def _item_of_url(self, reference: Reference) -> _Item:
        """Return the item for a URL in the workflow; the same URL is one file, however often it stands there."""
        known = self._items.get(reference.name)
        if known is None:
            taken = self._folders | {item.folder for item in self._items.values()}
            folder = next(name for name in map("url{}".format, itertools.count(1)) if name not in taken)
            known = _Item(len(self._items), _file_of_url(reference), folder)
            self._items[reference.name] = known
        return known

    def _use_folder(self, folder: str) -> None:
        for item in self._items.values():
            if item.file.name.startswith(f"{folder}/"):
                item.in_own_folder = True

    def _check_count(self) -> None:
        most = self._client.settings.input_max_files
        if len(self._items) > most:
            raise InvalidInput(f"The job has {len(self._items)} input files, and this worker takes {most} at most")

    def _loads_url(self, reference: Reference) -> bool:
        """Return whether a URL is there to be loaded; a combo without a flag may offer models, or URLs even."""
        config = self._config(reference)
        if (
            config.is_combo
            and not config.is_flagged
            and (reference.class_type, reference.input_name) not in _ANY_FOLDER
        ):
            return reference.value not in config.options and not _MODEL_FILE.search(name_of_url(reference.value))
        return config.loads_file

    def _listed_in(self, reference: Reference) -> str | None:
        """Return the folder whose files an input offers and nothing else, None for one that takes any file."""
        config = self._config(reference)
        if not config.is_combo or (reference.class_type, reference.input_name) in _ANY_FOLDER:
            return None
        is_3d = reference.class_type.startswith("Load3D") or any(
            option.startswith(f"{_3D_FOLDER}/") for option in config.options
        )
        return _3D_FOLDER if is_3d else ""

    def _config(self, reference: Reference) -> _InputConfig:
        inputs = self._client.patiently(lambda: self._client.node_inputs(reference.class_type), self._stop)
        return _InputConfig.of(inputs.get(reference.input_name))

    # -------------------------------------------------------------------------------------------- transfer

    def _stage_all(self, items: list[_Item]) -> list[Mapping[str | None, str]]:
        """Return for each item its names in ComfyUI's input folder, by where they must be listed."""
        with self._stop.waking(self._hurry.set), closing(self._fetcher):
            stagings = [self._client.transfers.submit(self._stage, item) for item in items]
            # Whatever becomes of one of them: none is under way any more when the job's folder is removed.
            wait(stagings)
        failures = [failure for failure in map(_failure, stagings) if failure is not None]
        self._stop.check()
        if failures:
            raise _merged([failure for failure in failures if not isinstance(failure, Cancelled)] or failures)
        return [staging.result() for staging in stagings]

    def _stage(self, item: _Item) -> Mapping[str | None, str]:
        try:
            self._hurry.check()
            with self._open(item.file) as content:
                head = content.read(HEAD_BYTES)
                name = self._checked_name(item, head)
                listings = {listed for _reference, listed in item.uses} | ({None} if item.in_own_folder else set())
                return {listed: self._upload(content, name, head, item, listed) for listed in listings}
        except (InvalidInput, InputFetchFailed, DiskFull):
            self._hurry.set()
            raise

    def _open(self, file: InputFile) -> BinaryIO:
        if file.url is not None:
            return self._fetcher.fetch(file.url, self._hurry)
        content = file.content or b""
        limit_mb = self._client.settings.input_max_mb
        if len(content) > limit_mb * _MB:
            raise InvalidInput(f"Image {file.name!r} is larger than an input may be, {limit_mb:g} MB")
        return io.BytesIO(content)

    @staticmethod
    def _checked_name(item: _Item, head: bytes) -> str:
        """Return the file's name in the job's folder; one that was made out of a URL gets the right extension."""
        name = item.file.name if item.folder is None else with_true_extension(item.file.name, head)
        pretended = disguise(head, name)
        if pretended:
            raise InvalidInput(f"Image {name!r} is {pretended}, not what its name says")
        return name if item.folder is None else f"{item.folder}/{name}"

    def _upload(self, content: BinaryIO, name: str, head: bytes, item: _Item, listed: str | None) -> str:
        prompt_id = self._job.prompt_id
        if listed is None:
            subfolder, _, filename = f"{prompt_id}/{name}".rpartition("/")
        else:
            # No other file has the name, in this job or another.
            prefix = f"{prompt_id}_{item.number}_"
            subfolder, filename = listed, prefix + shortened(name.replace("/", "_"), _LONGEST_NAME - len(prefix))
        self._stop.check()
        try:
            # The same file under the same name may be sent twice.
            return self._client.patiently(
                lambda: self._client.upload(content, filename, subfolder, content_type(head, name)), self._stop
            )
        except UploadFailed as error:
            raise UploadFailed(f"{item.file.name}: {error.message}") from error


@dataclass(frozen=True)
class _InputConfig:
    """What `/object_info` says of one input of a node class.

    Attributes:
        type: its type; None for one that the class does not have.
        is_combo: it offers a list of values.
        is_flagged: the class says that it names a file of the input folder.
        options: what it offered when it was first asked.
    """

    type: Any
    is_combo: bool
    is_flagged: bool
    options: tuple[str, ...]

    @classmethod
    def of(cls, config: Any) -> _InputConfig:
        kind = config[0] if config else None
        options = config[1] if config and len(config) > 1 else {}
        listed = kind if isinstance(kind, list) else options.get("options") or []
        return cls(
            type=kind,
            is_combo=isinstance(kind, list) or kind == "COMBO",
            is_flagged=any(options.get(flag) for flag in _UPLOAD_FLAGS),
            options=tuple(str(value) for value in listed),
        )

    @property
    def loads_file(self) -> bool:
        """Whether a node loads a file of the input folder by this input.

        A node says so with a flag or the input's type; one that says nothing may still offer the files as a list. A
        free text never counts, even when it reads like the name of a file.
        """
        return self.is_combo or self.is_flagged or self.type in _FILE_TYPES


def _file_of_url(reference: Reference) -> InputFile:
    name = name_of_url(reference.name)
    if reference.name[:5].lower() == "data:":
        return InputFile(name, decode_base64(reference.name, f"node {reference.node_id}"))
    return InputFile(name, url=reference.name)


def _folders_of(name: str) -> Iterator[str]:
    parts = name.split("/")
    return ("/".join(parts[:depth]) for depth in range(1, len(parts)))


def _failure(staging: Future[Mapping[str | None, str]]) -> WorkerError | None:
    try:
        staging.result()
    except WorkerError as error:
        return error
    return None


def _merged(failures: list[WorkerError]) -> WorkerError:
    """Return one error for several: what the caller can mend comes first, and each of its kind is named."""
    for kind in (InvalidInput, InputFetchFailed, DiskFull):
        same = [failure for failure in failures if isinstance(failure, kind)]
        if same:
            return kind("; ".join(dict.fromkeys(failure.message for failure in same)), hint=same[0].hint)
    messages = [failure.message for failure in failures if isinstance(failure, (UploadFailed, ComfyUnreachable))]
    if not messages:
        return failures[0]
    return UploadFailed(f"Failed to upload one or more input images: {'; '.join(messages)}")
