"""Recorded traffic of a real ComfyUI: which prompts were sent, what the websocket said, what the history knew."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.support.paths import DATA

FOLDER = DATA / "comfyui_traffic"
VERSIONS = ("v0.3.64", "v0.8.0")


@dataclass(frozen=True)
class Prompt:
    """A prompt that ComfyUI took, with its entry in the history if the recording asked for it."""

    prompt_id: str
    workflow: dict[str, Any]
    history: dict[str, Any] | None


@dataclass(frozen=True)
class Recording:
    """One scenario with one version of ComfyUI."""

    version: str
    scenario: str
    entries: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        return f"{self.version}-{self.scenario}"

    def requests(self, method: str, path: str) -> list[dict[str, Any]]:
        """Return the HTTP exchanges of one kind, in order."""
        http = (entry for entry in self.entries if entry["kind"] == "http")
        return [entry for entry in http if (entry["method"], entry["path"]) == (method, path)]

    def prompts(self) -> list[Prompt]:
        """Return the prompts that were taken, in the order in which they were sent."""
        taken = (entry for entry in self.requests("POST", "/prompt") if entry["status"] == 200)
        return [self._prompt(entry["response"]["prompt_id"], entry["request"]["json"]["prompt"]) for entry in taken]

    def _prompt(self, prompt_id: str, workflow: dict[str, Any]) -> Prompt:
        asked = self.requests("GET", f"/history/{prompt_id}")
        return Prompt(prompt_id, workflow, asked[-1]["response"].get(prompt_id) if asked else None)

    def frames(self) -> list[str | bytes]:
        """Return what came over the websocket; of a binary frame only its first 600 bytes were recorded."""
        return [_frame(entry) for entry in self.entries if entry["kind"] in ("ws_text", "ws_binary")]


def _frame(entry: dict[str, Any]) -> str | bytes:
    return json.dumps(entry["message"]) if entry["kind"] == "ws_text" else base64.b64decode(entry["base64_head"])


@cache
def recording(version: str, scenario: str) -> Recording:
    """Return one scenario with one version."""
    lines = (FOLDER / version / f"{scenario}.jsonl").read_text(encoding="utf-8").splitlines()
    return Recording(version, scenario, tuple(json.loads(line) for line in lines))


def all_recordings() -> list[Recording]:
    """Return every scenario with every version."""
    return [
        recording(version, path.stem) for version in VERSIONS for path in sorted((FOLDER / version).glob("*.jsonl"))
    ]
