"""A job that takes too long, or that is called off, ends; its prompt is out of ComfyUI, and nothing of it is left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from comfy_emulator.node_api import ImageBatch, NodeContext, NodeResult
from comfy_worker.types import JobEvent, NodeProgress, PromptsAhead, Stage, StageStarted
from comfy_worker.worker import Worker
from tests.support.comfyui import gate_node as gates
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI
from tests.support.comfyui.gate_node import Gate, job
from tests.support.docs.outcomes import shrunk
from tests.support.network.ports import closed_port
from tests.support.running_job import RunningJob
from tests.support.waiting import wait_until

ORANGE = (255, 128, 0)
LIMIT_S = 0.4
LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "WORKFLOW_TIMEOUT": ({"workflow_timeout_s": LIMIT_S}, {}, "The workflow took longer than 0.4 seconds"),
    "timeout_s": ({}, {"timeout_s": LIMIT_S}, "The workflow took longer than 0.4 seconds"),
    "timeout_s before WORKFLOW_TIMEOUT": (
        {"workflow_timeout_s": 0.001},
        {"timeout_s": LIMIT_S},
        "The workflow took longer than 0.4 seconds",
    ),
    "policy.executionTimeout": (
        {},
        {"policy": {"executionTimeout": 1000 * LIMIT_S}},
        "The job took longer than 0.4 seconds",
    ),
}
"""Each limit: the setting, what the job says, and the sentence that it ends with."""


@pytest.fixture(autouse=True)
def only_own_settings(environment: pytest.MonkeyPatch) -> None:
    """Take the settings of this machine away."""


@pytest.fixture
def victim() -> Iterator[EmulatedComfyUI]:
    with EmulatedComfyUI() as victim:
        yield victim


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


@contextmanager
def working(victim: EmulatedComfyUI, **settings: Any) -> Iterator[Worker]:
    with closing(Worker(shrunk(victim.url, **settings))) as worker:
        yield worker


@contextmanager
def another_running(victim: EmulatedComfyUI, folder: Path) -> Iterator[str]:
    """Have ComfyUI run somebody else's prompt, and check that nobody touched it."""
    blocker = Gate(folder)
    prompt_id = victim.submit(blocker.graph())
    blocker.wait_until_run()
    yield prompt_id
    assert victim.running() == [prompt_id]
    assert victim.pending() == []
    blocker.open()
    victim.wait_until_idle()
    assert victim.succeeded(prompt_id)


def submitted(victim: EmulatedComfyUI) -> list[str]:
    """Return every prompt that ComfyUI was ever given, as far as it knows."""
    return [*victim.finished(), *victim.running(), *victim.pending()]


# ------------------------------------------------------------------------------------------------ time limits


@pytest.mark.parametrize("limit", LIMITS)
def test_a_running_prompt_that_takes_too_long(victim: EmulatedComfyUI, gate: Gate, limit: str) -> None:
    settings, wish, sentence = LIMITS[limit]
    with working(victim, **settings) as worker:
        output = RunningJob(worker, job(gate.graph(), **wish)).output()
    assert (output["code"], output["error"]) == ("timed_out", sentence)
    assert gate.runs == 1
    assert victim.running() == victim.pending() == []


@pytest.mark.parametrize("limit", LIMITS)
def test_a_waiting_prompt_that_takes_too_long(victim: EmulatedComfyUI, gate: Gate, tmp_path: Path, limit: str) -> None:
    settings, wish, sentence = LIMITS[limit]
    with another_running(victim, tmp_path), working(victim, **settings) as worker:
        output = RunningJob(worker, job(gate.graph(), **wish)).output()
        assert (output["code"], output["error"]) == ("timed_out", sentence)
    assert gate.runs == 0


@pytest.mark.parametrize("limit", LIMITS)
def test_an_older_comfyui_does_not_interrupt_other_prompts(
    victim: EmulatedComfyUI, gate: Gate, tmp_path: Path, limit: str
) -> None:
    victim.server.faults.interrupt_ignores_prompt_id = True
    settings, wish, _sentence = LIMITS[limit]
    other = Gate(tmp_path)
    with working(victim, **settings) as worker:
        running = RunningJob(worker, job(gate.graph(), **wish))
        gate.wait_until_run()
        behind = victim.submit(other.graph())
        assert running.output()["code"] == "timed_out"
    other.open()
    victim.wait_until_idle()
    assert victim.succeeded(behind)


def test_an_older_comfyui_does_not_interrupt_other_prompts_while_ours_waits(
    victim: EmulatedComfyUI, gate: Gate, tmp_path: Path
) -> None:
    victim.server.faults.interrupt_ignores_prompt_id = True
    with another_running(victim, tmp_path), working(victim, workflow_timeout_s=LIMIT_S) as worker:
        assert RunningJob(worker, job(gate.graph())).output()["code"] == "timed_out"


def test_the_limit_includes_waiting_for_comfyui() -> None:
    with closed_port() as port, closing(Worker(shrunk(f"http://127.0.0.1:{port}"))) as worker:
        wish = {"policy": {"executionTimeout": 1000 * LIMIT_S}}
        output = RunningJob(worker, job(graphs.picture(ORANGE), **wish)).output()
    assert (output["code"], output["error"]) == ("timed_out", "The job took longer than 0.4 seconds")


def test_a_second_attempt_does_not_reset_the_clock(victim: EmulatedComfyUI, gate: Gate, tmp_path: Path) -> None:
    blocker = Gate(tmp_path)
    victim.submit(blocker.graph())
    blocker.wait_until_run()
    with working(victim, workflow_timeout_s=1.5) as worker:
        running = RunningJob(worker, job(gate.graph()))
        running.wait_for(lambda event: event == PromptsAhead(1))
        victim.kill()
        assert running.output()["code"] == "timed_out"


def test_a_workflow_without_a_sign_of_progress(victim: EmulatedComfyUI, gate: Gate) -> None:
    with working(victim, comfyui_stall_timeout_s=LIMIT_S) as worker:
        output = RunningJob(worker, job(gate.graph())).output()
    assert output["code"] == "timed_out"
    assert output["error"] == "The workflow showed no sign of progress for 0.4 seconds"
    assert victim.running() == []


def test_progress_resets_the_stall_timeout(victim: EmulatedComfyUI) -> None:
    stall_s = 1.0
    with working(victim, comfyui_stall_timeout_s=stall_s) as worker:
        running = RunningJob(worker, job(graphs.work(2 * stall_s, steps=40)))
        assert "error" not in running.output()
    assert running.all(NodeProgress)


def test_waiting_in_the_queue_is_not_a_stall(victim: EmulatedComfyUI, gate: Gate, tmp_path: Path) -> None:
    stall_s = 0.6
    blocker = Gate(tmp_path)
    victim.submit(blocker.graph())
    blocker.wait_until_run()
    gate.open()
    with working(victim, comfyui_stall_timeout_s=stall_s) as worker:
        running = RunningJob(worker, job(gate.graph()))
        # It is time itself that must not end the job.
        with pytest.raises(AssertionError, match="has not ended"):
            running.output(timeout_s=2 * stall_s)
        blocker.open()
        assert "error" not in running.output()


# ---------------------------------------------------------------------------------------------------- cancel


def at(stage: Stage) -> Callable[[JobEvent], bool]:
    return lambda event: event == StageStarted(stage)


@pytest.mark.parametrize("stage", Stage)
def test_a_job_is_cancelled_at_every_stage(victim: EmulatedComfyUI, gate: Gate, stage: Stage) -> None:
    if stage is Stage.DELIVERING:
        gate.open()
    images = [{"name": "a.png", "image": graphs.data_uri(graphs.png(ORANGE))}]
    graph = {**gate.graph(), **{f"{node_id}0": node for node_id, node in graphs.inverted("a.png").items()}}
    graph["20"]["inputs"]["image"] = ["10", 0]
    graph["90"]["inputs"]["images"] = ["20", 0]
    with working(victim) as worker:
        output = RunningJob(worker, job(graph, images=images), stop_at=at(stage)).output()
        assert (output["code"], output["error"]) == ("cancelled", "The job was cancelled")
        assert victim.running() == victim.pending() == []
        if stage is Stage.STAGING:
            assert submitted(victim) == []
        # The worker is none the worse for it.
        assert "error" not in RunningJob(worker, job(graphs.picture(ORANGE))).output()


def test_only_the_waiting_prompt_is_cancelled(victim: EmulatedComfyUI, gate: Gate, tmp_path: Path) -> None:
    victim.server.faults.interrupt_ignores_prompt_id = True
    with another_running(victim, tmp_path), working(victim) as worker:
        running = RunningJob(worker, job(gate.graph()))
        running.wait_for(lambda event: event == PromptsAhead(1))
        running.stop.set()
        assert running.output()["code"] == "cancelled"
    assert gate.runs == 0


@pytest.mark.parametrize("mishap", ["none", "websocket lost", "first interrupts come too early"])
def test_a_running_prompt_is_cancelled(victim: EmulatedComfyUI, gate: Gate, mishap: str) -> None:
    if mishap == "first interrupts come too early":
        victim.server.faults.ignore_interrupts = 2
    with working(victim) as worker:
        running = RunningJob(worker, job(gate.graph()))
        gate.wait_until_run()
        if mishap == "websocket lost":
            victim.refuse_websockets()
            victim.cut_websockets()
        running.stop.set()
        assert running.output()["code"] == "cancelled"
    assert victim.running() == victim.pending() == []


def test_a_job_is_cancelled_while_waiting_for_comfyui() -> None:
    with closed_port() as port, closing(Worker(shrunk(f"http://127.0.0.1:{port}"))) as worker:
        running = RunningJob(worker, job(graphs.picture(ORANGE)))
        running.wait_for_notice("Waiting for ComfyUI")
        running.stop.set()
        assert running.output()["code"] == "cancelled"


def test_a_job_is_cancelled_during_an_upload(victim: EmulatedComfyUI) -> None:
    faults = victim.server.faults
    faults.slow_down(0.3, "/upload/image")
    with working(victim) as worker:
        images = [{"name": "a.png", "image": graphs.data_uri(graphs.png(ORANGE))}]
        running = RunningJob(worker, job(graphs.inverted("a.png"), images=images))
        wait_until(lambda: not faults.slow_answers)
        running.stop.set()
        assert running.output()["code"] == "cancelled"
    assert submitted(victim) == []


def test_a_job_is_cancelled_during_a_download(victim: EmulatedComfyUI, tmp_path: Path) -> None:
    victim.server.faults.slow_down(0.5, "/view")
    delivered = tmp_path / "delivered"
    settings = {"local_delivery_dir": str(delivered), "local_delivery_url": "http://127.0.0.1/files"}
    with working(victim, **settings) as worker:
        wish = {"delivery": {"type": "local"}}
        running = RunningJob(worker, job(graphs.two_pictures(ORANGE, ORANGE), **wish))
        wait_until(lambda: list(delivered.rglob("*.png")) != [])
        running.stop.set()
        # That one of them was delivered makes no success of it.
        assert running.output()["code"] == "cancelled"


def test_a_node_that_ignores_interrupts_delays_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """The prompt stays in ComfyUI until the node is done; that is said in the log, and the job ends."""
    begun, done = threading.Event(), threading.Event()

    def deaf(_context: NodeContext, image: ImageBatch, file: str) -> NodeResult:
        begun.set()
        done.wait()
        return NodeResult((image,))

    nodes = gates.registry()
    nodes.add("TestGate")(deaf)
    graph = graphs.picture(ORANGE)
    graph["3"] = graphs.node("TestGate", image=["1", 0], file="")
    graph["9"]["inputs"]["images"] = ["3", 0]
    with EmulatedComfyUI(registry=nodes) as victim, working(victim, comfyui_lost_after_s=0.3) as worker:
        running = RunningJob(worker, job(graph))
        begun.wait()
        running.stop.set()
        assert running.output()["code"] == "cancelled"
        assert "ignores interrupts" in caplog.text
        done.set()
        victim.wait_until_idle()


# ------------------------------------------------------------------------------------------------ submission


def half_invalid() -> graphs.Graph:
    """Return a workflow with one output that can be made and one that cannot."""
    graph = graphs.two_pictures(ORANGE, ORANGE)
    graph["10"]["inputs"]["width"] = -1
    return graph


def test_skipped_outputs_are_a_warning(victim: EmulatedComfyUI) -> None:
    with working(victim) as worker:
        output = RunningJob(worker, job(half_invalid())).output()
    assert [image["node_id"] for image in output["images"]] == ["9"]
    [warning] = output["errors"]
    assert "90" in warning
    assert "-1" in warning


def test_skipped_outputs_fail_a_strict_job(victim: EmulatedComfyUI) -> None:
    with working(victim) as worker:
        output = RunningJob(worker, job(half_invalid(), strict=True)).output()
    assert output["code"] == "invalid_workflow"
    assert "-1" in output["error"]
    assert "images" not in output
    victim.wait_until_idle()


@pytest.mark.parametrize("lost", [1, 2])
def test_a_lost_submission_response_is_looked_up(victim: EmulatedComfyUI, gate: Gate, lost: int) -> None:
    victim.server.faults.lose_answer("/prompt", times=lost)
    gate.open()
    with working(victim) as worker:
        output = RunningJob(worker, job(gate.graph())).output()
    assert "error" not in output
    assert submitted(victim) == [output["prompt_id"]]
    assert gate.runs == 1


def test_a_submission_rejected_by_a_broken_comfyui_is_not_repeated(victim: EmulatedComfyUI) -> None:
    victim.server.faults.answer_with(500, "/prompt", method="POST", times=None)
    with working(victim) as worker:
        output = RunningJob(worker, job(graphs.picture(ORANGE))).output()
    assert output["code"] == "comfyui_unreachable"
    assert output["error"] == "ComfyUI answered 500 to POST /prompt"
    assert submitted(victim) == []


def test_a_possibly_started_prompt_is_not_resubmitted(victim: EmulatedComfyUI, gate: Gate) -> None:
    victim.server.faults.lose_answer("/prompt")
    # ComfyUI dies before it can be looked up.
    victim.server.faults.slow_down(60, "/queue", times=None)
    with working(victim) as worker:
        running = RunningJob(worker, job(gate.graph()))
        gate.wait_until_run()
        victim.kill()
        assert running.output()["code"] == "comfyui_crashed"
    assert gate.runs == 1


# -------------------------------------------------------------------------------------------- files and disk


def files_of_jobs(base: Path) -> list[str]:
    """Return what lies in ComfyUI's folders."""
    folders = (base / name for name in ("input", "output", "temp"))
    return sorted(str(path.relative_to(base)) for folder in folders for path in folder.rglob("*"))


def full_job(gate: Gate, **wish: Any) -> Mapping[str, Any]:
    """Return a job with an input, an output and a preview, which waits at its gate when it has both."""
    graph = graphs.inverted("sub/a.png")
    graph["5"] = graphs.node("PreviewImage", images=["2", 0])
    graph["3"] = {**gate.graph()["3"], "inputs": {**gate.graph()["3"]["inputs"], "image": ["2", 0]}}
    graph["6"] = graphs.node("SaveImage", images=["3", 0], filename_prefix="late")
    image = {"name": "sub/a.png", "image": graphs.data_uri(graphs.png(ORANGE))}
    return job(graph, images=[image], **wish)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[EmulatedComfyUI]:
    """Return a ComfyUI whose folders the worker can reach."""
    base = tmp_path / "comfyui"
    base.mkdir()
    with EmulatedComfyUI(base_directory=base) as victim:
        (base / "input" / "mine.png").write_bytes(graphs.png(ORANGE))
        yield victim


@pytest.mark.parametrize("end", ["success", "failure", "cancel"])
@pytest.mark.parametrize("connected", [True, False], ids=["websocket", "polling"])
def test_a_job_leaves_nothing_on_the_disk(kept: EmulatedComfyUI, gate: Gate, end: str, connected: bool) -> None:
    if not connected:
        kept.refuse_websockets()
    base = kept.server.base_directory
    before = files_of_jobs(base)
    with working(kept, comfyui_base_directory=str(base)) as worker:
        running = RunningJob(worker, full_job(gate, include_previews=True))
        gate.wait_until_run()
        during = set(files_of_jobs(base)) - set(before)
        assert {name.partition("/")[0] for name in during} == {"input", "output", "temp"}
        if end == "cancel":
            running.stop.set()
        else:
            gate.open("" if end == "success" else "nothing there")
        code = running.output().get("code")
    assert code == {"success": None, "failure": "execution_failed", "cancel": "cancelled"}[end]
    assert files_of_jobs(base) == before


def test_a_full_disk_fails_the_job_before_submission(kept: EmulatedComfyUI) -> None:
    base = kept.server.base_directory
    with working(kept, comfyui_base_directory=str(base), min_free_disk_mb=1e12) as worker:
        output = RunningJob(worker, job(graphs.picture(ORANGE))).output()
    assert output["code"] == "disk_full"
    assert "MIN_FREE_DISK_MB" in output["hint"]
    assert submitted(kept) == []
