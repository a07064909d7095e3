"""`/prompt`, `/queue`, `/history`, `/interrupt` and `/free`."""

from __future__ import annotations

import json
import logging
import time
import uuid
from typing import Any

from aiohttp import web

from comfy_emulator.emulator import Emulator, emulator_of
from comfy_emulator.execution.prompt_queue import QueueItem
from comfy_emulator.node_definitions import JsonObject
from comfy_emulator.validation.prompt import validate_prompt

logger = logging.getLogger(__name__)

SENSITIVE_KEYS = ("auth_token_comfy_org", "api_key_comfy_org")
"""Entries of `extra_data` that reach neither the queue nor the history."""


def add_prompt_routes(router: web.UrlDispatcher) -> None:
    """Add the routes of this module, each also under `/api`."""
    for prefix in ("", "/api"):
        router.add_get(f"{prefix}/prompt", get_prompt)
        router.add_post(f"{prefix}/prompt", post_prompt)
        router.add_get(f"{prefix}/queue", get_queue)
        router.add_post(f"{prefix}/queue", post_queue)
        router.add_post(f"{prefix}/interrupt", post_interrupt)
        router.add_post(f"{prefix}/free", post_free)
        router.add_get(f"{prefix}/history", get_history)
        router.add_get(f"{prefix}/history/{{prompt_id}}", get_history_of)
        router.add_post(f"{prefix}/history", post_history)


async def get_prompt(request: web.Request) -> web.Response:
    """Tell how many prompts wait or run."""
    return web.json_response(emulator_of(request).queue_info())


async def post_prompt(request: web.Request) -> web.Response:
    """Check a prompt and queue it, with those of its outputs that are valid."""
    emulator = emulator_of(request)
    body = await request.json()
    number = _number(emulator, body)
    if "prompt" not in body:
        text = "No prompt provided"
        error = {"type": "no_prompt", "message": text, "details": text, "extra_info": {}}
        return web.json_response({"error": error, "node_errors": {}}, status=400)
    prompt_id = str(body["prompt_id"]) if "prompt_id" in body else str(uuid.uuid4())
    targets = body.get("partial_execution_targets")
    verdict = validate_prompt(body["prompt"], emulator.interfaces, emulator.folders.input, targets)
    if verdict.error is not None:
        logger.info("Prompt %s refused: %s", prompt_id, verdict.error["message"])
        return web.json_response({"error": verdict.error, "node_errors": verdict.node_errors}, status=400)
    logger.info("Prompt %s taken.", prompt_id)
    emulator.queue.put(QueueItem(number, prompt_id, body["prompt"], _extra_data(body), verdict.outputs))
    return web.json_response({"prompt_id": prompt_id, "number": number, "node_errors": verdict.node_errors})


def _number(emulator: Emulator, body: Any) -> float:
    """Give the place in the queue; each submission without its own number counts, even one that is refused."""
    if "number" in body:
        return float(body["number"])
    number = emulator.submissions
    emulator.submissions += 1
    return -number if body.get("front") else number


def _extra_data(body: JsonObject) -> JsonObject:
    kept = {key: value for key, value in body.get("extra_data", {}).items() if key not in SENSITIVE_KEYS}
    if "client_id" in body:
        kept["client_id"] = body["client_id"]
    return {**kept, "create_time": int(time.time() * 1000)}


async def get_queue(request: web.Request) -> web.Response:
    """List the prompt that runs and those that wait."""
    running, waiting = emulator_of(request).queue.current()
    answer = {
        "queue_running": [item.as_json() for item in running],
        "queue_pending": [item.as_json() for item in waiting],
    }
    return web.json_response(answer)


async def post_queue(request: web.Request) -> web.Response:
    """Drop prompts that wait."""
    queue = emulator_of(request).queue
    body = await request.json()
    if body.get("clear"):
        queue.wipe_queue()
    for prompt_id in body.get("delete", ()):
        queue.delete(prompt_id)
    return web.Response()


async def post_interrupt(request: web.Request) -> web.Response:
    """Stop the prompt that runs, if it is the one that is named or none is named."""
    emulator = emulator_of(request)
    try:
        body = await request.json()
    except json.JSONDecodeError:
        body = {}
    prompt_id = body.get("prompt_id")
    everything = not prompt_id or emulator.faults.interrupt_ignores_prompt_id
    if (everything or emulator.queue.runs(prompt_id)) and not emulator.faults.takes_interrupt():
        emulator.interrupt.set()
    return web.Response()


async def post_free(request: web.Request) -> web.Response:
    """Forget cached results before the next prompt; models to unload there are none."""
    body = await request.json()
    if body.get("free_memory", False):
        emulator_of(request).queue.free_memory()
    return web.Response()


async def get_history(request: web.Request) -> web.Response:
    """List the prompts that ran, oldest first."""
    max_items = request.query.get("max_items")
    history = emulator_of(request).queue.history(
        max_items=None if max_items is None else int(max_items), offset=int(request.query.get("offset", -1))
    )
    return web.json_response(history)


async def get_history_of(request: web.Request) -> web.Response:
    """Tell how a prompt ended; `{}` while it has not."""
    return web.json_response(emulator_of(request).queue.history_of(request.match_info["prompt_id"]))


async def post_history(request: web.Request) -> web.Response:
    """Forget prompts that ran."""
    queue = emulator_of(request).queue
    body = await request.json()
    if body.get("clear"):
        queue.wipe_history()
    for prompt_id in body.get("delete", ()):
        queue.delete_history(prompt_id)
    return web.Response()
