"""What bit the users of other ComfyUI workers, one test each; a comment says where the same is tested in full.

What needs RunPod's side is in test_known_user_problems_on_runpod.py.

The letters are the issue trackers that the pains come from: W worker-comfyui, A ai-dock's comfyui-api-wrapper, S
SaladTechnologies' comfyui-api, R runpod-python, C ComfyUI, P comfy-api-proxy, K cog-comfyui.
"""

from __future__ import annotations

import base64
import io
import time
import wave
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from comfy_worker.job.progress import Progress
from comfy_worker.settings import load_settings
from comfy_worker.types import NodeStarted, Preview, PromptsAhead, Stage, StageStarted
from comfy_worker.worker import Worker
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.comfyui.gate_node import Gate, job
from tests.support.comfyui.traffic_recordings import recording
from tests.support.docs.outcomes import shrunk
from tests.support.running_job import RunningJob
from tests.support.storage.s3_server import ACCESS_KEY, SECRET_KEY, s3_server

ORANGE = (255, 128, 0)
GREEN = (0, 255, 0)
RED = (255, 0, 0)
SECRET = "comfyui-2f6b81aa90"


@pytest.fixture(scope="module")
def victim() -> Iterator[EmulatedComfyUI]:
    with EmulatedComfyUI() as victim:
        yield victim


@pytest.fixture(autouse=True)
def assert_next_job_succeeds(environment: pytest.MonkeyPatch, victim: EmulatedComfyUI) -> Iterator[None]:
    """Take the settings of this machine away, and whatever a test did to ComfyUI."""
    yield
    victim.server.faults.clear()
    victim.clear()


@pytest.fixture
def worker(victim: EmulatedComfyUI) -> Iterator[Worker]:
    with closing(Worker(shrunk(victim.url))) as worker:
        yield worker


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def content_of(output: dict[str, Any], kind: str = "images") -> list[bytes]:
    return [base64.b64decode(item["data"]) for item in output[kind]]


def image_file(name: str, color: graphs.Color) -> dict[str, str]:
    return {"name": name, "image": graphs.data_uri(graphs.png(color))}


# -------------------------------------------------------------------------------------------------- jobs end


def test_s186_c3128_c9393_k322_w137_the_job_hangs_when_the_websocket_drops(
    victim: EmulatedComfyUI, worker: Worker, gate: Gate
) -> None:
    # In full: test_outcomes.py.
    running = RunningJob(worker, job(gate.graph()))
    gate.wait_until_run()
    victim.refuse_websockets()
    victim.cut_websockets()
    gate.open()
    assert "error" not in running.output()


def test_worker_comfyui_loops_for_ever_when_the_prompt_finished_while_the_socket_was_away(
    victim: EmulatedComfyUI, gate: Gate
) -> None:
    # In full: test_outcomes.py. Nothing is ever asked because of the time here, only because the socket was reopened.
    victim.server.faults.drop_websocket_at_event = "execution_success"
    victim.server.faults.drop_websocket_times = 1
    gate.open()
    with closing(Worker(shrunk(victim.url, comfyui_poll_interval_s=600))) as worker:
        assert "error" not in RunningJob(worker, job(gate.graph())).output()


def test_salad_after_one_websocket_drop_every_later_job_hangs(
    victim: EmulatedComfyUI, worker: Worker, gate: Gate
) -> None:
    running = RunningJob(worker, job(gate.graph()))
    gate.wait_until_run()
    victim.cut_websockets()
    gate.open()
    assert "error" not in running.output()
    for _ in range(2):
        assert "error" not in RunningJob(worker, job(gate.graph())).output()


def test_ai_dock_2_s_of_polling_a_job(victim: EmulatedComfyUI, gate: Gate) -> None:
    gate.open()
    with closing(Worker(shrunk(victim.url, comfyui_poll_interval_s=600))) as worker:
        # Whatever is asked at intervals would not be asked before the end of this test.
        assert "error" not in RunningJob(worker, job(gate.graph())).output()


def test_w31_long_jobs_against_fixed_time_limits(worker: Worker, gate: Gate, victim: EmulatedComfyUI) -> None:
    # In full: test_limits_and_cancel.py.
    assert RunningJob(worker, job(gate.graph(), timeout_s=0.3)).output()["code"] == "timed_out"
    assert victim.running() == []


def test_w186_w125_k290_the_first_job_fails_while_comfyui_still_starts() -> None:
    # In full: tests/acceptance/test_health.py.
    with EmulatedComfyUI() as late:
        url = late.url
        late.kill()
        with closing(Worker(shrunk(url))) as worker:
            running = RunningJob(worker, job(graphs.picture(ORANGE)))
            running.wait_for_notice("Waiting for ComfyUI to start")
            late.start()
            assert "error" not in running.output()


def test_c7513_s113_r510_cancel_stops_the_gpu_queued_and_running(
    victim: EmulatedComfyUI, worker: Worker, gate: Gate, tmp_path: Path
) -> None:
    # In full: test_limits_and_cancel.py.
    second = Gate(tmp_path)
    first_job, second_job = RunningJob(worker, job(gate.graph())), None
    gate.wait_until_run()
    second_job = RunningJob(worker, job(second.graph()))
    second_job.wait_for(lambda event: event == PromptsAhead(1))
    for running in (second_job, first_job):
        running.stop.set()
        assert running.output()["code"] == "cancelled"
    assert victim.running() == victim.pending() == []


def test_ai_dock_a_cancelled_job_turns_completed(worker: Worker) -> None:
    # In full: test_limits_and_cancel.py.
    running = RunningJob(
        worker, job(graphs.picture(ORANGE)), stop_at=lambda event: event == StageStarted(Stage.DELIVERING)
    )
    assert running.output()["code"] == "cancelled"


def test_worker_comfyui_treats_an_interrupted_run_with_one_saved_file_as_success(
    victim: EmulatedComfyUI, worker: Worker, gate: Gate
) -> None:
    graph = {**gate.graph(), "8": graphs.node("SaveImage", images=["1", 0], filename_prefix="first")}
    running = RunningJob(worker, job(graph))
    gate.wait_until_run()
    assert list((victim.server.base_directory / "output").rglob("first_*.png"))
    victim.interrupt()
    output = running.output()
    assert (output["code"], output["partial"], "status" in output) == ("cancelled", True, False)
    [image] = output["images"]
    assert image["filename"].startswith("first")


def test_w186_s15_a5_out_of_memory_cuda_faults_crashes(victim: EmulatedComfyUI, worker: Worker) -> None:
    # In full: test_crashes.py.
    output = RunningJob(worker, job(graphs.work(0.01, steps=2, fail_at=1))).output()
    assert output["code"] == "out_of_memory"
    assert "Reduce image size or batch size" in output["hint"]
    assert len(victim.finished()) >= 2, "memory is freed, and the workflow tried once more"


# --------------------------------------------------------------------------------------------------- outputs


def recorded(scenario: str) -> list[dict[str, Any]]:
    return [prompt.workflow for prompt in recording("v0.8.0", scenario).prompts()]


def tone() -> dict[str, str]:
    """Return a tenth of a second of sound as an input."""
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\x01\x20" * 800)
    return {"name": "tone.wav", "image": base64.b64encode(sound.getvalue()).decode()}


def test_w232_w22_a64_video_audio_and_other_files_are_dropped(worker: Worker) -> None:
    # In full: tests/unit/test_outputs.py and test_same_answers.py.
    pictures, sounds, others = (
        RunningJob(worker, job(workflow, images=[tone()])).output()
        for workflow in recorded("outputs_animated_video_audio_text_latent_3d")
    )
    assert "video/mp4" in [item["mime_type"] for item in pictures["images"]]
    assert {item["mime_type"] for item in sounds["audio"]} == {"audio/flac", "audio/mpeg"}
    assert [item["filename"] for item in others["files"]] == ["ComfyUI_00001_.latent"]


def test_worker_comfyui_drops_every_output_key_but_images(worker: Worker) -> None:
    # In full: tests/unit/test_outputs.py.
    _pictures, sounds, others = recorded("outputs_animated_video_audio_text_latent_3d")
    assert RunningJob(worker, job(sounds, images=[tone()])).output()["audio"]
    assert RunningJob(worker, job(others)).output()["texts"]


def test_w129_w167_r309_a_big_result_is_completed_with_no_output(worker: Worker) -> None:
    # In full: tests/acceptance/test_results.py.
    output = RunningJob(worker, job(graphs.picture(ORANGE)), result_limit=65 * 1024).output()
    assert output["images"]
    graph = graphs.picture(ORANGE)
    graph["1"]["inputs"] |= {"width": 4096, "height": 4096}
    output = RunningJob(worker, job(graph), result_limit=66 * 1024).output()
    assert output["code"] == "output_too_large"
    assert "S3" in output["hint"]


def test_k79_c6261_an_identical_prompt_gives_an_empty_output(worker: Worker) -> None:
    graph = graphs.picture(ORANGE)
    outputs = [RunningJob(worker, job(graph)).output() for _ in range(2)]
    assert [len(content_of(output)) for output in outputs] == [1, 1]
    assert [graphs.colors(content_of(output)[0]) for output in outputs] == [[ORANGE], [ORANGE]]


def test_w123_w190_w224_s45_w5_s3(victim: EmulatedComfyUI) -> None:
    # In full: tests/contract/test_storage.py.
    with s3_server() as s3:
        bucket = s3.create_bucket()
        settings = load_settings(
            comfyui_url=victim.url,
            bucket_endpoint_url=f"{s3.url}/{bucket}",
            bucket_access_key_id=ACCESS_KEY,
            bucket_secret_access_key=SECRET_KEY,
        )
        with closing(Worker(settings)) as worker:
            wish = {"type": "s3", "prefix": "mine"}
            output = RunningJob(worker, job(graphs.picture(ORANGE), delivery=wish)).output()
        [image] = output["images"]
        assert image["type"] == "s3_url"
        assert s3.keys(bucket) == ["mine/ComfyUI_00001_.png"]


def test_k138_w118_which_node_made_which_output(worker: Worker) -> None:
    graph = graphs.two_pictures(ORANGE, GREEN)
    graph["90"]["_meta"] = {"title": "The green one"}
    output = RunningJob(worker, job(graph)).output()
    made = [(item["node_id"], item["class_type"], item["title"], item["index"]) for item in output["images"]]
    assert made == [("9", "SaveImage", "SaveImage", 0), ("90", "SaveImage", "The green one", 0)]


def test_salad_subfolders_are_ignored(worker: Worker) -> None:
    output = RunningJob(worker, job(graphs.picture(ORANGE, "sub/folder/mine"))).output()
    [image] = output["images"]
    assert (image["subfolder"], image["filename"]) == ("sub/folder", "mine_00001_.png")


def test_w139_metadata_in_the_png_wanted(worker: Worker) -> None:
    graph = graphs.picture(ORANGE)
    extra: dict[str, Any] = {"extra_pnginfo": {"workflow": {"nodes": []}}}
    output = RunningJob(worker, job(graph, extra_data=extra, convert={"keep_metadata": True})).output()
    with Image.open(io.BytesIO(content_of(output)[0])) as image:
        assert '"EmptyImage"' in image.info["prompt"]
        assert image.info["workflow"] == '{"nodes": []}'


def test_w_no_metadata_in_the_png_where_nothing_is_said(worker: Worker) -> None:
    """worker-comfyui runs ComfyUI with --disable-metadata."""
    output = RunningJob(worker, job(graphs.picture(ORANGE), extra_data={"extra_pnginfo": {"workflow": {}}})).output()
    [content] = content_of(output)
    assert graphs.colors(content) == [ORANGE]
    with Image.open(io.BytesIO(content)) as image:
        assert image.info == {}
    assert output["images"][0]["size_bytes"] == len(content)


def test_c4325_c5603_the_disk_fills(victim: EmulatedComfyUI) -> None:
    # In full: test_limits_and_cancel.py.
    base = victim.server.base_directory
    with closing(Worker(shrunk(victim.url, comfyui_base_directory=str(base)))) as worker:
        before = sorted(base.rglob("*"))
        RunningJob(worker, job(graphs.inverted("a.png"), images=[image_file("a.png", ORANGE)])).output()
    assert sorted(base.rglob("*")) == before


# ---------------------------------------------------------------------------------------------------- inputs


def test_w131_w57_w22_video_and_audio_inputs(worker: Worker) -> None:
    # In full: test_inputs.py.
    graph = {
        "1": graphs.node("LoadAudio", audio="tone.wav"),
        "2": graphs.node("SaveAudio", audio=["1", 0], filename_prefix="audio/ComfyUI"),
    }
    output = RunningJob(worker, job(graph, images=[tone()])).output()
    assert [item["mime_type"] for item in output["audio"]] == ["audio/flac"]


def test_worker_comfyui_uploads_at_signs_as_an_empty_picture(worker: Worker) -> None:
    # In full: tests/unit/test_payload.py.
    sent = {"name": "a.png", "image": "@@@@"}
    output = RunningJob(worker, job(graphs.inverted("a.png"), images=[sent])).output()
    assert (output["code"], output["error"]) == (
        "invalid_input",
        "Failed to upload one or more input images: Image 'a.png' is not valid base64",
    )


def test_p18_c1507_two_jobs_with_an_input_of_the_same_name_collide(victim: EmulatedComfyUI) -> None:
    with closing(Worker(shrunk(victim.url))) as worker:
        jobs = [
            RunningJob(worker, job(graphs.inverted("a.png"), images=[image_file("a.png", color)]))
            for color in (RED, GREEN)
        ]
        made = [graphs.colors(content_of(running.output())[0]) for running in jobs]
    assert made == [[(0, 255, 255)], [(255, 0, 255)]]


def test_ai_dock_a_request_id_writes_outside_the_output_folder(victim: EmulatedComfyUI, worker: Worker) -> None:
    # In full: tests/contract/test_storage.py for ids, tests/unit/test_payload.py for names.
    base = victim.server.base_directory
    outside = sorted(base.parent.glob("x*"))
    output = RunningJob(worker, {**job(graphs.picture(ORANGE)), "id": "../../x"}).output()
    assert "error" not in output
    refused = RunningJob(worker, job(graphs.inverted("../../x.png"), images=[image_file("../../x.png", ORANGE)]))
    assert refused.output()["code"] == "invalid_input"
    assert sorted(base.parent.glob("x*")) == outside


# ---------------------------------------------------------------------------------------------------- errors


def test_comfy_cli_pr833_k298_validation_errors_lost_or_garbled(worker: Worker) -> None:
    # In full: tests/unit/test_validation.py.
    graph = graphs.picture(ORANGE)
    graph["1"]["inputs"]["width"] = -5
    output = RunningJob(worker, job(graph)).output()
    assert output["code"] == "invalid_workflow"
    assert "Node 1 (width): -5 is smaller than the least allowed value 1" in output["error"]


def test_c9076_c4105_200_with_node_errors_outputs_silently_skipped(worker: Worker) -> None:
    # In full: test_limits_and_cancel.py.
    graph = graphs.two_pictures(ORANGE, GREEN)
    graph["10"]["inputs"]["width"] = -5
    output = RunningJob(worker, job(graph)).output()
    assert len(output["images"]) == 1
    assert "90" in output["errors"][0]
    assert RunningJob(worker, job(graph, strict=True)).output()["code"] == "invalid_workflow"


def test_w48_w91_w79_missing_models_and_nodes(worker: Worker) -> None:
    # In full: tests/unit/test_validation.py.
    graph = graphs.missing_model("no_such_model.safetensors")
    graph["40"] = graphs.node("NoSuchNode", images=["32", 0])
    error = RunningJob(worker, job(graph)).output()["error"]
    assert "NoSuchNode" in error


def test_c15473_ui_format_workflow_sent(worker: Worker) -> None:
    # In full: tests/unit/test_payload.py.
    output = RunningJob(worker, job({"nodes": [], "links": []})).output()  # type: ignore[dict-item]
    assert output["code"] == "ui_format_workflow"
    assert "Export (API)" in output["hint"]


def test_salad_errors_all_read_failed_to_get_prompt_outputs(worker: Worker, gate: Gate) -> None:
    gate.open("the moon is in the wrong phase")
    error = RunningJob(worker, job(gate.graph())).output()["error"]
    assert "TestGate" in error
    assert "Node ID: 3" in error
    assert "the moon is in the wrong phase" in error


def test_salad_credentials_are_echoed(worker: Worker, gate: Gate) -> None:
    # In full: tests/unit/test_worker_results.py; for webhooks test_webhooks.py.
    gate.open(f"could not log in with {SECRET}")
    output = RunningJob(worker, job(gate.graph(), comfy_org_api_key=SECRET)).output()
    assert output["code"] == "execution_failed"
    assert SECRET not in str(output)


# -------------------------------------------------------------------------------------------------- progress


def test_w36_w221_s106_progress_queue_position_previews(victim: EmulatedComfyUI, worker: Worker, gate: Gate) -> None:
    # In full: tests/unit/test_progress.py and tests/acceptance/test_job_loop.py.
    graph = gate.graph()
    graph["5"] = graphs.node("TestWork", image=["3", 0], seconds=0.05, steps=5, preview=True, fail_at=0)
    graph["9"]["inputs"]["images"] = ["5", 0]
    blocker = victim.submit(gate.graph())
    gate.wait_until_run()
    running = RunningJob(worker, job(graph))
    running.wait_for(lambda event: event == PromptsAhead(1))
    gate.open()
    assert "error" not in running.output()
    assert victim.succeeded(blocker)
    progress, percents = Progress(frozenset(graph)), []
    for event in running.events:
        progress.apply(event)
        percents.append(progress.percent)
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert len(set(percents)) > 5
    assert running.all(Preview)
    assert [event.node_id for event in running.all(NodeStarted)][-1] == "9"


def test_p18_harmful_health_checks(victim: EmulatedComfyUI, worker: Worker, gate: Gate) -> None:
    RunningJob(worker, job(gate.graph()))
    gate.wait_until_run()
    # Only the length of the queue is asked for: nothing that opens a device, and nothing that waits for the GPU.
    victim.server.faults.slow_down(60, "/system_stats", times=None)
    began = time.monotonic()
    assert worker.client.is_ready()
    assert time.monotonic() - began < 30
