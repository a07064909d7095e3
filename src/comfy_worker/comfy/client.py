"""A client of ComfyUI's HTTP API: one method a request, with errors of this project."""

from __future__ import annotations

import contextlib
import io
import logging
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
from comfy_worker.comfy.process import ComfyProcess
from comfy_worker.comfy.protocol import PromptPosition, prompt_position
from comfy_worker.comfy.requirements import inputs_of
from comfy_worker.comfy.socket import SocketPool
from comfy_worker.comfy.validation import refusal
from comfy_worker.errors import ComfyUnreachable, InvalidWorkflow, OutputMissing, UploadFailed
from comfy_worker.settings import Settings
from comfy_worker.stop import Stop
from comfy_worker.types import OutputFile, Workflow

log = logging.getLogger(__name__)

TRANSFER_THREADS = 8
"""How many files of one job are staged at the same time, and how many of all jobs are delivered."""
_CONNECT_TIMEOUT_S = 5.0
_QUERY_TIMEOUT_S = 5.0
"""For requests that ComfyUI answers from memory."""
_POLL_INTERVAL_S = 0.05
_ATTEMPTS = 3
_ERROR_TIMEOUT_S = 2.0
"""How long to repeat a request that gets no good response."""
_LATE_PROMPT_TIMEOUT_S = 5.0
"""How long to look for a prompt whose submission timed out, before it is submitted again."""
_REMOVE_TIMEOUT_S = 10.0

Result = TypeVar("Result")


class ComfyClient:
    """Speaks HTTP to one ComfyUI over persistent connections; safe to use from several threads.

    Attributes:
        settings: the settings that the client was made with.
        url: ComfyUI's URL.
        process: ComfyUI's process, if start.sh runs it.
        disk: ComfyUI's folders, if this process can access them.
        sockets: websockets to ComfyUI, one per job.
        transfers: the threads that deliver files.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url = settings.comfyui_url
        self.process = ComfyProcess.of(settings)
        self.disk = ComfyDisk.of(settings)
        self.sockets = SocketPool(settings)
        self.transfers = ThreadPoolExecutor(TRANSFER_THREADS, thread_name_prefix="transfer")
        self._session = _open_session()
        self._node_inputs: dict[str, Mapping[str, Any]] = {}

    def close(self) -> None:
        """Close the connections and end the threads."""
        self.sockets.close()
        self.transfers.shutdown(wait=False, cancel_futures=True)
        self._session.close()

    # ---------------------------------------------------------------------------------------------- state

    def is_ready(self) -> bool:
        """Return whether ComfyUI responds to a request that costs it nothing."""
        try:
            self._get_json("/prompt")
        except ComfyUnreachable:
            return False
        return True

    def is_listening(self) -> bool:
        """Return whether anything accepts connections at ComfyUI's address; a ComfyUI that hangs still does."""
        parts = urlsplit(self.url)
        address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        try:
            socket.create_connection(address, timeout=_CONNECT_TIMEOUT_S).close()
        except OSError:
            return False
        return True

    def wait_until_ready(self, stop: Stop, limit_s: float = math.inf) -> None:
        """Return as soon as ComfyUI answers; restart it meanwhile if it hangs and start.sh runs it.

        Raises:
            ComfyUnreachable: it did not answer within `ready_timeout_s`, or within `limit_s` if that is less.
            Cancelled: the job was cancelled meanwhile.
        """
        deadline = time.monotonic() + min(limit_s, self.settings.ready_timeout_s)
        silent_since = math.inf
        while not self.is_ready():
            now = time.monotonic()
            if now >= deadline or (self.process and self.process.given_up()):
                raise self.unreachable()
            # A process that does not listen yet is starting; one that listens and does not answer hangs.
            silent_since = min(silent_since, now) if self.is_listening() else math.inf
            if self.process and now - silent_since >= self.settings.comfyui_lost_after_s:
                log.error("ComfyUI accepts connections and does not answer: it is restarted")
                self.process.kill()
                silent_since = math.inf
            stop.wait(_POLL_INTERVAL_S)
            stop.check()

    def retrying(self, request: Callable[[], Result], stop: Stop) -> Result:
        """Make an idempotent request, up to three times; before each repetition, wait until ComfyUI is ready.

        Raises:
            ComfyUnreachable: ComfyUI did not answer.
            Cancelled: `stop` was set meanwhile.
        """
        for _attempt in range(1, _ATTEMPTS):
            try:
                return request()
            except ComfyUnreachable:
                stop.check()
                self.wait_until_ready(stop)
        return request()

    def unreachable(self) -> ComfyUnreachable:
        """Return the error about a ComfyUI that did not answer for too long."""
        return ComfyUnreachable(
            f"ComfyUI server ({self.settings.comfyui_address}) not reachable after multiple retries",
            hint="Is ComfyUI running there? COMFYUI_URL says where it is looked for",
        )

    # --------------------------------------------------------------------------------------------- prompt

    def submit(
        self, graph: Workflow, prompt_id: str, client_id: str, extra_data: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Queue a prompt under our own id; return ComfyUI's `node_errors`, the parts that it will skip.

        If the response is lost, the prompt is looked up by its id, so it is never queued twice.

        Raises:
            InvalidWorkflow: ComfyUI refused it.
            ComfyUnreachable: it could not be queued.
        """
        body = {"prompt": graph, "prompt_id": prompt_id, "client_id": client_id, "extra_data": dict(extra_data)}
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                response = self._request("POST", "/prompt", json=body)
                break
            except ComfyUnreachable as error:
                # An earlier attempt may have arrived, even if this one was never sent.
                error.never_sent = attempt == 1 and _was_refused(error)
                if error.never_sent or attempt == _ATTEMPTS:
                    raise
                timed_out = isinstance(error.__cause__, requests.ReadTimeout)
                if self._poll(lambda: self.knows(prompt_id), _LATE_PROMPT_TIMEOUT_S if timed_out else 0.0):
                    return {}
        if response.status_code == requests.codes.bad_request:
            raise refusal(_json(response, dict), graph, self.object_info)
        _check(response)
        return _json(response, dict).get("node_errors") or {}

    def knows(self, prompt_id: str) -> bool:
        """Return whether the prompt is waiting, running or done."""
        return self.position(prompt_id) is not None or self.history(prompt_id) is not None

    def history(self, prompt_id: str) -> Mapping[str, Any] | None:
        """Return the history entry of a prompt, None if it has not ended or is not known."""
        entry = self._get_json(f"/history/{prompt_id}").get(prompt_id)
        return entry if isinstance(entry, Mapping) else None

    def position(self, prompt_id: str) -> PromptPosition | None:
        """Return the position of a prompt in the queue, None if it is not there."""
        return prompt_position(self._get_json("/queue"), prompt_id)

    def remove(self, prompt_id: str) -> bool:
        """Remove a prompt from ComfyUI, whether it waits or runs; return whether it is out within ten seconds.

        `/interrupt` is only sent while our own prompt is the running one: older ComfyUIs ignore the id in it and
        interrupt whatever runs.
        """
        timeout_s = min(_REMOVE_TIMEOUT_S, self.settings.comfyui_lost_after_s)
        return self._poll(lambda: self._try_to_remove(prompt_id), timeout_s)

    def _try_to_remove(self, prompt_id: str) -> bool:
        """Return whether a prompt is out of ComfyUI; ask ComfyUI to remove it if it is not."""
        position = self.position(prompt_id)
        if position is None:
            return True
        if position.running:
            _check(self._request("POST", "/interrupt", json={"prompt_id": prompt_id}))
        else:
            _check(self._request("POST", "/queue", json={"delete": [prompt_id]}))
        return False

    def _poll(self, check: Callable[[], bool], timeout_s: float) -> bool:
        """Call `check` until it returns True, at least once; return whether it did so in time.

        A single wrong or lost response says nothing: for two seconds at least, `check` is called again after one.

        Raises:
            ComfyUnreachable: ComfyUI does not answer.
        """
        began = time.monotonic()
        while True:
            elapsed = time.monotonic() - began
            try:
                if check():
                    return True
                if elapsed >= timeout_s:
                    return False
            except ComfyUnreachable:
                if elapsed >= max(timeout_s, _ERROR_TIMEOUT_S) or not self.is_listening():
                    raise
            time.sleep(_POLL_INTERVAL_S)

    def free_memory(self) -> None:
        """Make ComfyUI unload its models and empty its caches before it runs the next prompt."""
        _check(self._request("POST", "/free", json={"unload_models": True, "free_memory": True}))

    # ---------------------------------------------------------------------------------- nodes and models

    def node_inputs(self, class_type: str) -> Mapping[str, Any] | None:
        """Return the inputs of a node class, name to `[type, options]`; None if ComfyUI does not have the class.

        They are cached: the values of a combo may change, types and options do not.
        """
        if class_type not in self._node_inputs:
            found = self._get_json(f"/object_info/{quote(class_type, safe='')}").get(class_type)
            if found is None:
                return None
            self._node_inputs[class_type] = inputs_of(found)
        return self._node_inputs[class_type]

    def object_info(self) -> Mapping[str, Any]:
        """Return the definitions of all node classes: megabytes with many custom nodes."""
        return self._get_json("/object_info", timeout_s=self.settings.comfyui_request_timeout_s)

    def models(self, folders: Iterable[str] | None = None) -> Mapping[str, Sequence[str]]:
        """Return the files in ComfyUI's model folders, by folder: `/models` and `/models/{folder}`.

        Args:
            folders: an unknown folder is empty; None for all but `custom_nodes`, which lists every source file.
        """
        wanted = self._get_list("/models") if folders is None else folders
        return {
            str(folder): [str(name) for name in self._get_list(f"/models/{quote(str(folder), safe='')}")]
            for folder in wanted
            if folder != "custom_nodes"
        }

    def model_facts(self, folder: str) -> Sequence[Mapping[str, Any]]:
        """Return `name`, `pathIndex`, `size` (bytes) and `modified` of a folder's models; empty in old ComfyUIs."""
        return self._get_list(f"/experiment/models/{quote(folder, safe='')}")

    def model_roots(self) -> Mapping[str, Sequence[str]]:
        """Return the paths of each model folder on ComfyUI's disk; `pathIndex` is an index into them."""
        return {str(root["name"]): list(root["folders"]) for root in self._get_list("/experiment/models")}

    # ---------------------------------------------------------------------------------------------- files

    def upload(self, content: BinaryIO, name: str, folder: str, content_type: str) -> str:
        """Upload a file into a folder of ComfyUI's input folder; return the name by which a node loads it.

        `content` is read from its start while it is sent.

        Raises:
            UploadFailed: ComfyUI did not accept it.
            DiskFull: ComfyUI's disk is too full for it.
            ComfyUnreachable: ComfyUI does not answer.
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
        stored = _json(response, dict)
        return "/".join(part for part in (stored.get("subfolder", ""), stored["name"]) if part)

    def view(self, file: OutputFile) -> requests.Response:
        """Return a response that streams an output file; the caller closes it.

        Raises:
            OutputMissing: ComfyUI does not have the file that it reported.
            ComfyUnreachable: ComfyUI does not answer.
        """
        params = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}
        response = self._request("GET", "/view", params=params, headers={"Accept-Encoding": "identity"}, stream=True)
        if not response.ok:
            response.close()
        if response.status_code in (400, 403, 404):
            raise OutputMissing(f"ComfyUI reported {file.filename} and does not have it")
        _check(response)
        return response

    # ------------------------------------------------------------------------------------------- requests

    def _get_json(self, path: str, timeout_s: float = _QUERY_TIMEOUT_S) -> Mapping[str, Any]:
        response = self._request("GET", path, timeout_s=min(timeout_s, self.settings.comfyui_request_timeout_s))
        _check(response)
        return _json(response, dict)

    def _get_list(self, path: str) -> Sequence[Any]:
        """Return a list; an empty one if ComfyUI answers 404."""
        response = self._request("GET", path)
        if response.status_code == requests.codes.not_found:
            return []
        _check(response)
        return _json(response, list)

    def _request(self, method: str, path: str, timeout_s: float | None = None, **arguments: Any) -> requests.Response:
        timeout = (_CONNECT_TIMEOUT_S, timeout_s or self.settings.comfyui_request_timeout_s)
        try:
            return self._session.request(method, f"{self.url}{path}", timeout=timeout, **arguments)
        except requests.exceptions.InvalidJSONError:
            raise InvalidWorkflow(
                "Workflow validation failed: a number in it is not finite (NaN or Infinity), which JSON does not have"
            ) from None
        except requests.RequestException as error:
            raise ComfyUnreachable(
                f"ComfyUI server ({self.settings.comfyui_address}) did not answer {method} {_endpoint(path)}"
            ) from error


def _open_session() -> requests.Session:
    session = requests.Session()
    # ComfyUI is never behind the environment's proxy, and looking for one costs time on every request.
    session.trust_env = False
    retry = Retry(connect=2, read=1, status=0, backoff_factor=0.05, allowed_methods={"GET"}, raise_on_status=False)
    adapter = HTTPAdapter(pool_maxsize=TRANSFER_THREADS + 2, max_retries=retry)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def _was_refused(error: ComfyUnreachable) -> bool:
    """Return whether no connection could be made, so that the request was certainly not sent."""
    cause = error.__cause__.args[0] if error.__cause__ and error.__cause__.args else None
    return isinstance(getattr(cause, "reason", None), NewConnectionError)


def _check(response: requests.Response) -> None:
    if not response.ok:
        path = _endpoint(urlsplit(response.url).path)
        raise ComfyUnreachable(f"ComfyUI answered {response.status_code} to {response.request.method} {path}")


def _endpoint(path: str) -> str:
    """Return the first part of a path; with the rest it would be redacted as a local path."""
    return "/" + path.strip("/").partition("/")[0].partition("?")[0]


def _json(response: requests.Response, kind: type[Result]) -> Result:
    with contextlib.suppress(ValueError):
        body = response.json()
        if isinstance(body, kind):
            return body
    name = "list" if kind is list else "JSON object"
    raise ComfyUnreachable(f"ComfyUI answered {response.request.method} with something that is not a {name}")
