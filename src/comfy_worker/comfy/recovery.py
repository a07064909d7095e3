"""Leaves ComfyUI usable for the next job: removes prompts, and restarts a ComfyUI that hangs or is broken."""

from __future__ import annotations

import logging

from comfy_worker.comfy.client import ComfyClient
from comfy_worker.comfy.protocol import NodeFailed, Outcome
from comfy_worker.errors import WorkerError

log = logging.getLogger(__name__)


def remove_prompt(client: ComfyClient, prompt_id: str) -> None:
    """Remove a prompt, or else restart ComfyUI if it hangs; failures are logged."""
    try:
        if not client.remove(prompt_id):
            log.warning("prompt %s is still in ComfyUI: the running node ignores interrupts", prompt_id)
    except WorkerError as error:
        log.warning("prompt %s could not be removed from ComfyUI: %s", prompt_id, error)
        # The prompt would go on running, and the next job would have to wait for it.
        restart_if_hanging(client)


def restart_if_hanging(client: ComfyClient) -> None:
    """Restart a ComfyUI that accepts connections and does not answer."""
    if client.process is not None and client.is_listening() and not client.is_ready():
        log.error("ComfyUI does not answer any more and is restarted")
        client.process.kill()


def restart_if_broken(client: ComfyClient, outcome: Outcome) -> None:
    """Restart a ComfyUI in which every later job would fail too."""
    if client.process is not None and isinstance(outcome, NodeFailed) and outcome.is_broken_device:
        log.error("node %s broke the GPU context; ComfyUI is restarted", outcome.node_id)
        client.process.kill()
