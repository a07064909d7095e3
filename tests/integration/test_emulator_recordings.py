"""The emulator answers as the ComfyUI 0.8.0 did that was recorded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from comfy_emulator import EmulatorServer
from tests.support.comfyui.traffic_replay import Replay, read_recording

IN_RECORDED_ORDER = (
    "text_to_image_shape",
    "repeat_is_cached",
    "changed_prefix_reuses_upstream_cache",
    "progress_and_previews",
    "previews_with_metadata",
    "save_image_websocket",
    "save_image_websocket_with_metadata",
    "execution_error",
    "execution_error_corrupt_input",
    "validation_errors",
    "uploads",
    "view",
    "interrupt_running",
    "queue_order_and_delete",
    "websocket_reconnect_mid_run",
    "websocket_down_while_finishing",
    "outputs_animated_video_audio_text_latent_3d",
    "service_endpoints",
    "comfy_org_api_key",
)
"""Numbers of prompts and files go on from one recording to the next, and so does the cache."""

STEPS_DIFFER = {"interrupt_running", "websocket_reconnect_mid_run"}
"""How many steps the client sees depends on the moment of its action."""

ORDER_DIFFERS = {"outputs_animated_video_audio_text_latent_3d"}


@pytest.fixture(scope="module")
def replays() -> Iterator[dict[str, Replay]]:
    with EmulatorServer(models={}) as server:
        replays: dict[str, Replay] = {}
        prompt_ids: dict[str, str] = {}
        for name in IN_RECORDED_ORDER:
            replays[name] = Replay(
                server, prompt_ids, skip_progress=name in STEPS_DIFFER, any_order=name in ORDER_DIFFERS
            )
            replays[name].run(read_recording(name))
        yield replays


@pytest.mark.parametrize("name", IN_RECORDED_ORDER)
def test_recording(name: str, replays: dict[str, Replay]) -> None:
    replay = replays[name]
    for recorded, answered in zip(replay.recorded, replay.answered, strict=True):
        assert answered == recorded
