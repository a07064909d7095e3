"""ComfyUI's HTTP API: one method a request, foreign errors made ours."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests_toolbelt import MultipartEncoder
from urllib3.exceptions import NewConnectionError
from urllib3.util import Retry

from comfy_worker.comfy.disk import ComfyDisk
from comfy_worker.comfy.output_reader import ViewStream
from comfy_worker.comfy.process import ComfyProcess, Hang
from comfy_worker.comfy.protocol import PromptPosition, prompt_position
from comfy_worker.comfy.socket import SocketPool
from comfy_worker.comfy.validation import refusal
from comfy_worker.errors import ComfyUnreachable, InvalidWorkflow, OutputMissing, UploadFailed
from comfy_worker.settings import Settings
from comfy_worker.stop import Stop
from comfy_worker.types import OutputFile, Workflow

TRANSFER_THREADS = 8
"""How many files of one job are staged at the same time, and how many of all jobs are delivered."""
_CONNECT_TIMEOUT_S = 5.0
_QUESTION_TIMEOUT_S = 5.0
"""For questions that ComfyUI answers from memory; files take as long as they take."""
_READY_INTERVAL_S = 0.05
_ATTEMPTS = 3
_LOOK_UP_S = 2.0
"""How long it is asked again whether a prompt arrived whose answer got lost, where the question is not answered."""
_LATE_PROMPT_S = 5.0
"""How long a prompt is looked for that ComfyUI did not answer in time, before it is sent again."""
_NO_MODELS = "custom_nodes"
_REMOVE_TIMEOUT_S = 10.0
_REMOVE_INTERVALS_S = (0.02, 0.05, 0.1, 0.25)

Answer = TypeVar("Answer")


class ComfyClient:
    """Speaks HTTP to one ComfyUI over kept-open connections; safe to use from several threads.

    Attributes:
        process: ComfyUI's own process, where start.sh keeps it up.
        disk: its folders, where they can be reached.
        sockets: its websockets, one a job.
        transfers: the threads in which files go to and fro.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._session = _open_session(TRANSFER_THREADS)
        self._node_inputs: dict[str, Mapping[str, Any]] = {}
        self.process = ComfyProcess.of(settings)
        self.disk = ComfyDisk.of(settings)
        self.sockets = SocketPool(
            settings.comfyui_url,
            reconnect_attempts=settings.websocket_reconnect_attempts,
            reconnect_delay_s=settings.websocket_reconnect_delay_s,
            connect_timeout_s=min(_CONNECT_TIMEOUT_S, settings.comfyui_request_timeout_s),
        )
        self.transfers = ThreadPoolExecutor(TRANSFER_THREADS, thread_name_prefix="transfer")

    @property
    def url(self) -> str:
        """Where ComfyUI listens."""
        return self._settings.comfyui_url

    @property
    def settings(self) -> Settings:
        """What the client was made with."""
        return self._settings

    def close(self) -> None:
        """Close the connections and end the threads."""
        self.sockets.close()
        self.transfers.shutdown(wait=False, cancel_futures=True)
        self._session.close()

    # ---------------------------------------------------------------------------------------------- state

    def is_ready(self) -> bool:
        """Return whether ComfyUI answers; touches nothing that could keep its GPU busy."""
        try:
            self._get_json("/prompt")
        except ComfyUnreachable:
            return False
        return True

    def is_listening(self) -> bool:
        """Return whether anything takes connections where ComfyUI should; one that hangs still does."""
        parts = urlsplit(self.url)
        address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        try:
            socket.create_connection(address, timeout=_CONNECT_TIMEOUT_S).close()
        except OSError:
            return False
        return True

    def wait_until_ready(self, stop: Stop, limit_s: float = math.inf) -> None:
        """Return as soon as ComfyUI answers; one of our own that hangs is restarted meanwhile.

        Raises:
            ComfyUnreachable: it did not within `ready_timeout_s`, or within `limit_s` if that is less.
            Cancelled: the job was cancelled meanwhile.
        """
        deadline = time.monotonic() + min(limit_s, self._settings.ready_timeout_s)
        hang = Hang(self.process, self._settings.comfyui_lost_after_s) if self.process else None
        while not self.is_ready():
            if time.monotonic() >= deadline or (self.process and self.process.given_up()):
                raise self.unreachable()
            if hang is not None:
                hang.went_on(is_listening=self.is_listening())
            stop.wait(_READY_INTERVAL_S)
            stop.check()

    def patiently(self, request: Callable[[], Answer], stop: Stop) -> Answer:
        """Return what a request returns that may be repeated; before each repetition, wait for ComfyUI to be back.

        Raises:
            ComfyUnreachable: it did not answer, or not in time.
            Cancelled: `stop` was set meanwhile; nothing is repeated then.
        """
        for _attempt in range(1, _ATTEMPTS):
            try:
                return request()
            except ComfyUnreachable:
                stop.check()
                self.wait_until_ready(stop)
        return request()

    def unreachable(self) -> ComfyUnreachable:
        """Return the error for a ComfyUI that was tried again and again."""
        return ComfyUnreachable(
            f"ComfyUI server ({self._settings.comfyui_address}) not reachable after multiple retries",
            hint="Is ComfyUI running there? COMFYUI_URL says where it is looked for",
        )

    def system_stats(self) -> Mapping[str, Any]:
        """Return `/system_stats`: version, memory, devices."""
        return self._get_json("/system_stats")

    # --------------------------------------------------------------------------------------------- prompt

    def submit(
        self, graph: Workflow, prompt_id: str, client_id: str, extra_data: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Queue a prompt under our own id; return ComfyUI's `node_errors`, the parts that it will skip.

        An answer that got lost is looked up by that id; the prompt is never queued twice.

        Raises:
            InvalidWorkflow: ComfyUI refused it.
            ComfyUnreachable: it could not be queued.
        """
        body = {"prompt": graph, "prompt_id": prompt_id, "client_id": client_id, "extra_data": dict(extra_data)}
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                response = self._request("POST", "/prompt", json=body)
            except ComfyUnreachable as error:
                # One that was sent before may have arrived, whatever became of this one.
                error.never_sent = error.never_sent and attempt == 1
                if error.never_sent or attempt == _ATTEMPTS:
                    raise
                is_late = isinstance(error.__cause__, requests.ReadTimeout)
                if self._took(prompt_id, _LATE_PROMPT_S if is_late else 0.0):
                    return {}
                continue
            if response.status_code == requests.codes.bad_request:
                raise refusal(_json(response), graph, self.object_info)
            _check(response)
            return _json(response).get("node_errors") or {}
        raise AssertionError("every attempt returns or raises")

    def knows(self, prompt_id: str) -> bool:
        """Return whether the prompt is waiting, running or done."""
        return self.place(prompt_id) is not None or self.history(prompt_id) is not None

    def _took(self, prompt_id: str, patience_s: float) -> bool:
        """Return whether a prompt arrived whose answer got lost; a busy ComfyUI may take it a little later."""
        deadline = time.monotonic() + patience_s
        give_up_at = max(deadline, time.monotonic() + _LOOK_UP_S)
        while True:
            try:
                if self.knows(prompt_id):
                    return True
                if time.monotonic() >= deadline:
                    return False
            except ComfyUnreachable as error:
                # One answer that is wrong or lost says nothing of the prompt.
                if time.monotonic() >= give_up_at or not self.is_listening():
                    error.never_sent = False
                    raise
            time.sleep(_READY_INTERVAL_S)

    def history(self, prompt_id: str) -> Mapping[str, Any] | None:
        """Return the entry of a prompt that has ended, None for one that has not (or is not known)."""
        entry = self._get_json(f"/history/{prompt_id}").get(prompt_id)
        return entry if isinstance(entry, Mapping) else None

    def place(self, prompt_id: str) -> PromptPosition | None:
        """Return where the prompt stands in the queue, None if it does not."""
        return prompt_position(self._get_json("/queue"), prompt_id)

    def remove(self, prompt_id: str) -> bool:
        """Take a prompt out of ComfyUI, whether it waits or runs; return whether it is out.

        `/interrupt` is only sent while our own prompt is the running one: older ComfyUIs ignore the id in it and
        interrupt whatever runs.
        """
        deadline = time.monotonic() + min(_REMOVE_TIMEOUT_S, self._settings.comfyui_lost_after_s)
        for interval_s in itertools.chain(_REMOVE_INTERVALS_S, itertools.repeat(_REMOVE_INTERVALS_S[-1])):
            is_last = time.monotonic() >= deadline
            try:
                if self._is_out(prompt_id):
                    return True
            except ComfyUnreachable:
                # One answer that is lost or wrong must not leave a prompt in for hours.
                if is_last or not self.is_listening():
                    raise
            if is_last:
                return False
            time.sleep(interval_s)
        raise AssertionError("the loop ends by returning")

    def _is_out(self, prompt_id: str) -> bool:
        """Return whether a prompt is out of ComfyUI; ask for it to be taken out if it is not."""
        place = self.place(prompt_id)
        if place is None:
            return True
        if place.running:
            _check(self._request("POST", "/interrupt", json={"prompt_id": prompt_id}))
        else:
            _check(self._request("POST", "/queue", json={"delete": [prompt_id]}))
        return False

    def free_memory(self) -> None:
        """Have ComfyUI unload its models and empty its caches, before it runs the next prompt."""
        _check(self._request("POST", "/free", json={"unload_models": True, "free_memory": True}))

    # ---------------------------------------------------------------------------------------------- nodes

    def node_inputs(self, class_type: str) -> Mapping[str, Any] | None:
        """Return the inputs of a node class, name to `[type, options]`; None for a class that is not there.

        The values that a combo offers change, types and options do not: they are remembered.
        """
        known = self._node_inputs.get(class_type)
        if known is None:
            known = self._fetch_inputs(class_type)
            if known is not None:
                self._node_inputs[class_type] = known
        return known

    def object_info(self) -> Mapping[str, Any]:
        """Return what ComfyUI says of all its node classes: megabytes on a machine with many custom nodes."""
        return self._get_json("/object_info", timeout_s=self._settings.comfyui_request_timeout_s)

    def models(self, folders: Iterable[str] | None = None) -> Mapping[str, Sequence[str]]:
        """Return the files in ComfyUI's model folders, by folder: `/models` and `/models/{folder}`.

        Args:
            folders: those that are wanted, empty for one that there is not; all if None, but for `custom_nodes`, in
                which each file of each package counts as a model.
        """
        wanted = self._get_names("/models") if folders is None else folders
        return {
            folder: self._get_names(f"/models/{quote(folder, safe='')}") for folder in wanted if folder != _NO_MODELS
        }

    def model_facts(self, folder: str) -> Sequence[Mapping[str, Any]]:
        """Return `name`, `pathIndex`, `size` (bytes) and `modified` of a folder's models; nothing if it is old."""
        return self._get_list(f"/experiment/models/{quote(folder, safe='')}")

    def model_roots(self) -> Mapping[str, Sequence[str]]:
        """Return where on ComfyUI's disk the models of each folder lie, in the order that `pathIndex` counts."""
        return {str(root["name"]): list(root["folders"]) for root in self._get_list("/experiment/models")}

    def _get_names(self, path: str) -> Sequence[str]:
        """Return a list of names; an empty one where ComfyUI has nothing at the path."""
        return [str(name) for name in self._get_list(path)]

    def _get_list(self, path: str) -> Sequence[Any]:
        """Return a list; an empty one where ComfyUI has nothing at the path."""
        response = self._request("GET", path)
        if response.status_code == requests.codes.not_found:
            return []
        _check(response)
        with contextlib.suppress(ValueError):
            found = response.json()
            if isinstance(found, list):
                return found
        raise ComfyUnreachable(f"ComfyUI answered GET {_endpoint(path)} with something that is not a list")

    def _fetch_inputs(self, class_type: str) -> Mapping[str, Any] | None:
        path = f"/object_info/{quote(class_type, safe='')}"
        found = self._get_json(path).get(class_type)
        if found is None:
            return None
        inputs = found.get("input", {})
        return {**inputs.get("optional", {}), **inputs.get("required", {})}

    # ---------------------------------------------------------------------------------------------- files

    def upload(self, content: BinaryIO, name: str, folder: str, content_type: str) -> str:
        """Put a file into a folder of ComfyUI's input folder; return the name by which a node loads it.

        It is read from `content`, from its start, as it is sent.

        Raises:
            UploadFailed: ComfyUI did not take it.
            DiskFull: ComfyUI's disk has no room for it.
            ComfyUnreachable: it does not answer.
        """
        size = content.seek(0, io.SEEK_END)
        content.seek(0)
        form = MultipartEncoder(
            {"subfolder": folder, "overwrite": "true", "type": "input", "image": (name, content, content_type)}
        )
        response = self._request("POST", "/upload/image", data=form, headers={"Content-Type": form.content_type})
        if response.status_code == requests.codes.request_entity_too_large:
            raise UploadFailed("it is larger than ComfyUI takes")
        if response.status_code >= requests.codes.server_error and self.disk is not None:
            self.disk.check_free(size)
        if not response.ok:
            raise UploadFailed(f"ComfyUI answered {response.status_code}")
        stored = _json(response)
        return "/".join(part for part in (stored.get("subfolder", ""), stored["name"]) if part)

    def view(self, file: OutputFile, start: int = 0) -> ViewStream:
        """Return the content of an output, on its way; close it.

        Args:
            file: as ComfyUI reported it.
            start: the first byte that is wanted.

        Raises:
            OutputMissing: ComfyUI does not have the file that it reported.
            ComfyUnreachable: it does not answer.
        """
        params = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}
        # Compressed by a proxy, it would have another length than it says.
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
        response = self._request("GET", "/view", params=params, headers=headers, stream=True)
        if not response.ok:
            response.close()
        if response.status_code in (400, 403, 404):
            raise OutputMissing(f"ComfyUI reported {file.filename} and does not have it")
        _check(response)
        return ViewStream(response, file.filename, is_part=start > 0)

    # ------------------------------------------------------------------------------------------- requests

    def _get_json(self, path: str, timeout_s: float = _QUESTION_TIMEOUT_S) -> Mapping[str, Any]:
        response = self._request("GET", path, timeout_s=min(timeout_s, self._settings.comfyui_request_timeout_s))
        _check(response)
        return _json(response)

    def _request(self, method: str, path: str, timeout_s: float | None = None, **arguments: Any) -> requests.Response:
        timeout = (_CONNECT_TIMEOUT_S, timeout_s or self._settings.comfyui_request_timeout_s)
        try:
            return self._session.request(method, f"{self.url}{path}", timeout=timeout, **arguments)
        except requests.exceptions.InvalidJSONError:
            raise InvalidWorkflow(
                "Workflow validation failed: a number in it is not finite (NaN or Infinity), which JSON does not have"
            ) from None
        except requests.RequestException as error:
            unreachable = ComfyUnreachable(
                f"ComfyUI server ({self._settings.comfyui_address}) did not answer {method} {_endpoint(path)}"
            )
            cause = error.args[0] if error.args else None
            unreachable.never_sent = isinstance(getattr(cause, "reason", None), NewConnectionError)
            raise unreachable from error


def _open_session(connections: int) -> requests.Session:
    session = requests.Session()
    # A proxy of the environment is for the world outside; looking for one costs time on every request.
    session.trust_env = False
    retry = Retry(connect=2, read=1, status=0, backoff_factor=0.05, allowed_methods={"GET"}, raise_on_status=False)
    adapter = HTTPAdapter(pool_maxsize=connections + 2, max_retries=retry)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def _check(response: requests.Response) -> None:
    if not response.ok:
        path = _endpoint(urlsplit(response.url).path)
        raise ComfyUnreachable(f"ComfyUI answered {response.status_code} to {response.request.method} {path}")


def _endpoint(path: str) -> str:
    """Return the part of a path that names the endpoint; what follows may be taken for a local path."""
    return "/" + path.strip("/").partition("/")[0].partition("?")[0]


def _json(response: requests.Response) -> Mapping[str, Any]:
    with contextlib.suppress(ValueError):
        body = response.json()
        if isinstance(body, Mapping):
            return body
    raise ComfyUnreachable(f"ComfyUI answered {response.request.method} with something that is not a JSON object")
