"""`/prompt`, `/queue`, `/history`, `/interrupt` and `/free` (`server.py` of ComfyUI)."""

from __future__ import annotations

import json
import logging
import time
import uuid
from typing import Any

from aiohttp import web

from comfy_emulator.emulator import Emulator
from comfy_emulator.execution.prompt_queue import QueueItem
from comfy_emulator.json_types import JsonObject
from comfy_emulator.server.request import emulator_of
from comfy_emulator.validation.prompt import validate_prompt

logger = logging.getLogger(__name__)

SENSITIVE_EXTRA_DATA_KEYS = ("auth_token_comfy_org", "api_key_comfy_org")
"""Entries of `extra_data` that do not appear in the queue or the history (`execution.py`)."""


def add_routes(router: web.UrlDispatcher, prefix: str) -> None:
    """Add the routes of this module below `prefix`."""
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
    """Return the number of pending and running prompts."""
    return web.json_response(emulator_of(request).queue_info())


async def post_prompt(request: web.Request) -> web.Response:
    """Validate a prompt and queue it with those of its outputs that are valid."""
    emulator = emulator_of(request)
    body = await request.json()
    number = _number(emulator, body)
    if "prompt" not in body:
        text = "No prompt provided"
        error = {"type": "no_prompt", "message": text, "details": text, "extra_info": {}}
        return web.json_response({"error": error, "node_errors": {}}, status=400)
    prompt_id = str(body["prompt_id"]) if "prompt_id" in body else str(uuid.uuid4())
    targets = body.get("partial_execution_targets")
    result = validate_prompt(body["prompt"], emulator.definitions, emulator.folders, targets)
    if result.error is not None:
        logger.info("Prompt %s refused: %s", prompt_id, result.error["message"])
        return web.json_response({"error": result.error, "node_errors": result.node_errors}, status=400)
    logger.info("Prompt %s accepted.", prompt_id)
    emulator.queue.put(QueueItem(number, prompt_id, body["prompt"], _extra_data(body), result.good_outputs))
    return web.json_response({"prompt_id": prompt_id, "number": number, "node_errors": result.node_errors})


def _number(emulator: Emulator, body: Any) -> float:
    """Return the queue number; it counts submissions without their own number, even refused ones."""
    if "number" in body:
        return float(body["number"])
    number = emulator.next_number
    emulator.next_number += 1
    return -number if body.get("front") else number


def _extra_data(body: JsonObject) -> JsonObject:
    kept = {key: value for key, value in body.get("extra_data", {}).items() if key not in SENSITIVE_EXTRA_DATA_KEYS}
    if "client_id" in body:
        kept["client_id"] = body["client_id"]
    return {**kept, "create_time": int(time.time() * 1000)}


async def get_queue(request: web.Request) -> web.Response:
    """Return the running and the pending prompts."""
    running, waiting = emulator_of(request).queue.get_current_queue()
    current = {
        "queue_running": [item.as_json() for item in running],
        "queue_pending": [item.as_json() for item in waiting],
    }
    return web.json_response(current)


async def post_queue(request: web.Request) -> web.Response:
    """Remove pending prompts."""
    queue = emulator_of(request).queue
    body = await request.json()
    if body.get("clear"):
        queue.wipe_queue()
    for prompt_id in body.get("delete", ()):
        queue.delete_queue_item(prompt_id)
    return web.Response()


async def post_interrupt(request: web.Request) -> web.Response:
    """Interrupt the running prompt if it is the one in the body, or if none is."""
    emulator = emulator_of(request)
    try:
        body = await request.json()
    except json.JSONDecodeError:
        body = {}
    prompt_id = body.get("prompt_id")
    any_prompt = not prompt_id or emulator.faults.interrupt_ignores_prompt_id
    if (any_prompt or emulator.queue.is_running(prompt_id)) and not emulator.faults.count_down("ignore_interrupts"):
        emulator.interrupt.set()
    return web.Response()


async def post_free(request: web.Request) -> web.Response:
    """Clear the cache before the next prompt; there are no models to unload."""
    body = await request.json()
    if body.get("free_memory", False):
        emulator_of(request).queue.request_free_memory()
    return web.Response()


async def get_history(request: web.Request) -> web.Response:
    """Return the finished prompts, oldest first."""
    max_items = request.query.get("max_items")
    history = emulator_of(request).queue.get_history(
        max_items=None if max_items is None else int(max_items), offset=int(request.query.get("offset", -1))
    )
    return web.json_response(history)


async def get_history_of(request: web.Request) -> web.Response:
    """Return a finished prompt, `{}` if it has not finished."""
    return web.json_response(emulator_of(request).queue.get_history_of(request.match_info["prompt_id"]))


async def post_history(request: web.Request) -> web.Response:
    """Remove finished prompts."""
    queue = emulator_of(request).queue
    body = await request.json()
    if body.get("clear"):
        queue.wipe_history()
    for prompt_id in body.get("delete", ()):
        queue.delete_history_item(prompt_id)
    return web.Response()
