"""What is done about a ComfyUI that runs out of memory, breaks its GPU context, crashes or hangs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pytest_mock import MockerFixture

from comfy_emulator.node_api import ImageBatch, NodeContext, NodeResult
from comfy_worker.types import NodeFinished, NodeStarted, PromptsAhead, Stage, StageStarted
from comfy_worker.worker import Worker
from tests.support.comfyui import gate_node as gates
from tests.support.comfyui import graphs
from tests.support.comfyui.controllable import EmulatedComfyUI, proxy_to
from tests.support.comfyui.gate_node import Gate, job
from tests.support.comfyui.supervised import SupervisedComfyUI, supervised
from tests.support.docs.outcomes import lose, shrunk
from tests.support.running_job import RunningJob
from tests.support.waiting import wait_until

ORANGE = (255, 128, 0)


@dataclass
class FailingNode:
    """A node that fails as often as configured, and one before it that counts how often it has to work.

    Attributes:
        failures: what the node raises, one each time it runs, before it succeeds.
        runs: how often it ran.
        fresh_runs: how often the node before it ran; while its result is cached it does not.
    """

    failures: list[Exception] = field(default_factory=list)
    runs: int = 0
    fresh_runs: int = 0

    def victim(self) -> EmulatedComfyUI:
        """Return a ComfyUI that has both nodes."""
        nodes = gates.registry()
        nodes.add("TestBefore")(self._count)
        nodes.add("TestTrouble")(self._run)
        info = dict.fromkeys(("TestBefore", "TestTrouble"), gates.OBJECT_INFO["ImageInvert"])
        return EmulatedComfyUI(registry=nodes, object_info={**gates.OBJECT_INFO, **info})

    def graph(self) -> graphs.Graph:
        """Return a workflow that comes by both, as nodes 3 and 4."""
        graph = graphs.picture(ORANGE)
        graph["3"] = graphs.node("TestBefore", image=["1", 0])
        graph["4"] = graphs.node("TestTrouble", image=["3", 0])
        graph["9"]["inputs"]["images"] = ["4", 0]
        return graph

    def _count(self, _context: NodeContext, image: ImageBatch) -> NodeResult:
        self.fresh_runs += 1
        return NodeResult((image,))

    def _run(self, _context: NodeContext, image: ImageBatch) -> NodeResult:
        self.runs += 1
        if self.failures:
            raise self.failures.pop(0)
        return NodeResult((image,))


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
def own(victim: EmulatedComfyUI, folder: Path, **settings: Any) -> Iterator[tuple[Worker, SupervisedComfyUI]]:
    """Return a worker whose ComfyUI is its own."""
    with ExitStack() as stack:
        process = stack.enter_context(supervised(victim.server, folder))
        yield stack.enter_context(working(victim, **process.settings, **settings)), process


# ----------------------------------------------------------------------------------------------- out of memory

OUT_OF_MEMORY = [
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB"),
    RuntimeError("Allocation on device 0 would exceed allowed memory. (out of memory)"),
    RuntimeError("Allocation on device"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.81 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("Unable to allocate 12.0 GiB for an array with shape (1, 4096, 4096)"),
    OSError(12, "Cannot allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("failure", OUT_OF_MEMORY, ids=str)
def test_out_of_memory_frees_memory_and_reruns_once(failure: Exception) -> None:
    trouble = FailingNode([failure])
    with trouble.victim() as victim, working(victim) as worker:
        running = RunningJob(worker, job(trouble.graph()))
        output = running.output()
        running.wait_for_notice("ran out of memory")
        assert len(victim.finished()) == 2
    assert "error" not in output
    assert output["errors"] == ["Node 4 (TestTrouble) ran out of memory: freed it, ran once more"]
    assert [image["filename"] for image in output["images"]] == ["ComfyUI_00001_.png"]
    assert trouble.fresh_runs == 2, "ComfyUI was to forget its results too"


def test_the_workflow_reruns_although_freeing_memory_is_not_confirmed() -> None:
    trouble = FailingNode([MemoryError()])
    with trouble.victim() as victim, working(victim) as worker:
        victim.server.faults.lose_answer("/free")
        output = RunningJob(worker, job(trouble.graph())).output()
    assert "error" not in output


def test_persistent_out_of_memory_fails_the_job_with_advice() -> None:
    trouble = FailingNode([RuntimeError("CUDA out of memory.")] * 9)
    with trouble.victim() as victim, working(victim) as worker:
        output = RunningJob(worker, job(trouble.graph())).output()
    assert output["code"] == "out_of_memory"
    assert output["error"].endswith("Node Type: TestTrouble, Node ID: 4, Message: CUDA out of memory.")
    assert output["hint"] == "Reduce image size or batch size, or use a larger GPU"
    assert output["details"]["node_id"] == "4"
    assert trouble.runs == 2


# --------------------------------------------------------------------------------------------- broken devices

BROKEN = [
    RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: misaligned address"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
]


@pytest.mark.parametrize("failure", BROKEN, ids=str)
def test_a_broken_gpu_context_restarts_comfyui(failure: Exception, tmp_path: Path) -> None:
    trouble = FailingNode([failure])
    with trouble.victim() as victim, own(victim, tmp_path) as (worker, process):
        output = RunningJob(worker, job(trouble.graph())).output()
        assert output["code"] == "execution_failed"
        process.wait_until_restarted()
        # The next job does not suffer from it.
        assert "error" not in RunningJob(worker, job(trouble.graph())).output()
        assert len(process.pids) == 2
    assert trouble.runs == 2


def test_a_foreign_comfyui_is_left_alone() -> None:
    trouble = FailingNode([BROKEN[0]])
    with trouble.victim() as victim, working(victim, retry_on_crash=True) as worker:
        assert RunningJob(worker, job(trouble.graph())).output()["code"] == "execution_failed"
        assert victim.server.running
    assert trouble.runs == 1


def test_the_workflow_reruns_on_the_new_comfyui_if_requested(tmp_path: Path) -> None:
    trouble = FailingNode([BROKEN[0]])
    with trouble.victim() as victim, own(victim, tmp_path) as (worker, process):
        output = RunningJob(worker, job(trouble.graph(), retry_on_crash=True)).output()
        assert len(process.pids) == 2
    assert "error" not in output
    assert output["errors"] == ["ComfyUI died while it ran the workflow, which was run again"]


@pytest.mark.parametrize("first", [BROKEN[0], OUT_OF_MEMORY[0]], ids=str)
def test_a_crashing_second_attempt_restarts_comfyui_too(first: Exception, tmp_path: Path) -> None:
    trouble = FailingNode([first, BROKEN[0]])
    with trouble.victim() as victim, own(victim, tmp_path) as (worker, process):
        wish = {"retry_on_crash": first is BROKEN[0]}
        assert RunningJob(worker, job(trouble.graph(), **wish)).output()["code"] == "execution_failed"
        process.wait_until_restarted(2 if first is BROKEN[0] else 1)
        assert "error" not in RunningJob(worker, job(trouble.graph())).output()


# ----------------------------------------------------------------------------------------------------- crashes


@pytest.mark.parametrize(
    ("setting", "wish", "runs"),
    [(False, {}, 1), (True, {}, 2), (False, {"retry_on_crash": True}, 2), (True, {"retry_on_crash": False}, 1)],
)
def test_a_started_workflow_reruns_only_if_requested(
    victim: EmulatedComfyUI, gate: Gate, setting: bool, wish: dict[str, Any], runs: int
) -> None:
    with working(victim, retry_on_crash=setting) as worker:
        running = RunningJob(worker, job(gate.graph(), **wish))
        running.wait_for(lambda event: isinstance(event, NodeStarted) and event.node_id == "3")
        gate.wait_until_run()
        victim.kill()
        gate.open()
        victim.start()
        output = running.output()
    assert output.get("code") == ("comfyui_crashed" if runs == 1 else None)
    assert gate.runs == runs


def has_begun(running: RunningJob, times: int) -> bool:
    """Return whether the worker has been notified so often that the workflow began."""
    return begun(running, Stage.RUNNING) == times


def begun(running: RunningJob, stage: Stage) -> int:
    """Return how often a stage was entered."""
    return running.all(StageStarted).count(StageStarted(stage))


def test_a_started_workflow_reruns_only_once(victim: EmulatedComfyUI, gate: Gate) -> None:
    with working(victim, retry_on_crash=True) as worker:
        running = RunningJob(worker, job(gate.graph()))
        for attempt in (1, 2):
            gate.wait_until_run(attempt)
            wait_until(partial(has_begun, running, attempt))
            victim.kill()
            victim.start()
        output = running.output()
    assert output["code"] == "comfyui_crashed"
    assert gate.runs == 2


def test_an_unstarted_workflow_is_resubmitted_only_once(victim: EmulatedComfyUI, gate: Gate, tmp_path: Path) -> None:
    block(victim, tmp_path)
    with working(victim) as worker:
        running = RunningJob(worker, job(gate.graph()))
        wait_until(lambda: running.all(PromptsAhead) != [])
        victim.kill()
        running.wait_for_notice("submitted again")
        # Somebody else is quicker once more.
        victim.server.faults.answer_with(503, "/prompt", method="GET", times=None)
        victim.start()
        block(victim, tmp_path)
        victim.server.faults.clear()
        wait_until(lambda: begun(running, Stage.QUEUED) == 2 and running.events[-1] == PromptsAhead(1))
        victim.kill()
        output = running.output()
    assert output["code"] == "comfyui_crashed"
    assert output["error"] == "ComfyUI died before it began the workflow, twice"
    assert gate.runs == 0


def block(victim: EmulatedComfyUI, folder: Path) -> None:
    """Have ComfyUI run somebody else's prompt for good."""
    blocker = Gate(folder)
    victim.submit(blocker.graph())
    blocker.wait_until_run()


def test_a_crash_is_reported_with_comfyuis_last_output(victim: EmulatedComfyUI, gate: Gate, tmp_path: Path) -> None:
    with own(victim, tmp_path) as (worker, process):
        running = RunningJob(worker, job(gate.graph()))
        running.wait_for(lambda event: event == StageStarted(Stage.RUNNING))
        process.kill()
        output = running.output()
    assert output["code"] == "comfyui_crashed"
    assert output["details"] == {"log": ["loading models", "out of luck"]}
    assert "retry_on_crash" in output["hint"]


def test_an_abandoned_comfyui_is_not_waited_for(victim: EmulatedComfyUI, tmp_path: Path) -> None:
    pid_file = tmp_path / "comfyui.pid"
    pid_file.write_text("ComfyUI died 5 times in 60 s with exit code 1.\n")
    victim.kill()
    with working(victim, comfyui_pid_file=str(pid_file)) as worker:
        output = RunningJob(worker, job(graphs.picture(ORANGE))).output(timeout_s=20)
    assert output["code"] == "comfyui_unreachable"


# ------------------------------------------------------------------------- files on their way during a restart

PICTURE = {"name": "a.png", "image": graphs.data_uri(graphs.png(ORANGE))}


def restarted_during(victim: EmulatedComfyUI, path: str, method: str) -> dict[str, Any]:
    """Run a job with an input and an output while ComfyUI restarts under one of its requests."""
    faults = victim.server.faults
    faults.slow_down(60, path, method=method)
    with working(victim) as worker:
        running = RunningJob(worker, job(graphs.inverted("a.png"), images=[PICTURE]))
        wait_until(lambda: not faults.slow_answers)
        victim.kill()
        victim.start()
        return running.output()


@pytest.mark.parametrize(
    ("path", "method"), [("/upload/image", "POST"), ("/object_info/*", "GET"), ("/view", "GET")], ids=str
)
def test_a_restart_during_a_repeatable_request_is_waited_out(victim: EmulatedComfyUI, path: str, method: str) -> None:
    output = restarted_during(victim, path, method)
    assert "error" not in output, output
    assert len(output["images"]) == 1


@pytest.mark.parametrize(("path", "method"), [("/upload/image", "POST"), ("/view", "GET")], ids=str)
@pytest.mark.parametrize("times", [1, 2])
def test_a_lost_response_is_requested_again(victim: EmulatedComfyUI, path: str, method: str, times: int) -> None:
    victim.server.faults.lose_answer(path, method=method, times=times)
    with working(victim) as worker:
        output = RunningJob(worker, job(graphs.inverted("a.png"), images=[PICTURE])).output()
    assert "error" not in output, output


def test_unavailable_outputs_fail_the_job(victim: EmulatedComfyUI) -> None:
    victim.server.faults.answer_with(500, "/view", times=None)
    with working(victim) as worker:
        output = RunningJob(worker, job(graphs.picture(ORANGE))).output()
    assert output["code"] == "comfyui_unreachable"


# ----------------------------------------------------------------------------------------------------- hanging

HANGING = {"comfyui_request_timeout_s": 0.5, "comfyui_lost_after_s": 0.3, "comfyui_ready_timeout_s": 0.5}


def test_a_comfyui_hanging_during_a_job_is_killed(victim: EmulatedComfyUI, gate: Gate, tmp_path: Path) -> None:
    with own(victim, tmp_path, **HANGING) as (worker, process):
        running = RunningJob(worker, job(gate.graph()))
        gate.wait_until_run()
        victim.hang()
        assert running.output()["code"] == "comfyui_unreachable"
        process.wait_until_restarted()
        assert "error" not in RunningJob(worker, job(graphs.picture(ORANGE))).output()


def test_a_comfyui_hanging_between_jobs_is_killed(victim: EmulatedComfyUI, tmp_path: Path) -> None:
    with own(victim, tmp_path, **HANGING) as (worker, process):
        victim.hang()
        assert RunningJob(worker, job(graphs.picture(ORANGE))).output()["code"] == "comfyui_unreachable"
        process.wait_until_restarted()
        assert "error" not in RunningJob(worker, job(graphs.picture(ORANGE))).output()


def test_a_slowly_starting_comfyui_is_not_killed(victim: EmulatedComfyUI, tmp_path: Path) -> None:
    with own(victim, tmp_path, comfyui_ready_timeout_s=0.3) as (worker, process):
        # Its process is there, and it does not listen yet.
        victim.kill()
        assert RunningJob(worker, job(graphs.picture(ORANGE))).output()["code"] == "comfyui_unreachable"
        assert len(process.pids) == 1
        victim.start()
        assert "error" not in RunningJob(worker, job(graphs.picture(ORANGE))).output()


# -------------------------------------------------------------------------- pictures that only the websocket has


def sent(gate: Gate, *, saved_too: bool) -> graphs.Graph:
    """Return a workflow whose picture is sent over the websocket when its gate is open."""
    graph = gate.graph()
    graph["8"] = graphs.node("SaveImageWebsocket", images=["3", 0])
    return graph if saved_too else {node_id: node for node_id, node in graph.items() if node_id != "9"}


def test_images_sent_over_the_websocket_arrive(victim: EmulatedComfyUI, gate: Gate) -> None:
    gate.open()
    with working(victim) as worker:
        output = RunningJob(worker, job(sent(gate, saved_too=True))).output()
    assert sorted(image["node_id"] for image in output["images"]) == ["8", "9"]
    assert "errors" not in output


@pytest.mark.parametrize("saved_too", [True, False])
def test_images_lost_with_the_websocket_are_reported(victim: EmulatedComfyUI, gate: Gate, saved_too: bool) -> None:
    with working(victim) as worker:
        running = RunningJob(worker, job(sent(gate, saved_too=saved_too)))
        gate.wait_until_run()
        lose(victim)
        gate.open()
        output = running.output()
    sentence = "Node 8 (SaveImageWebsocket): its images were lost with the websocket; a SaveImage node keeps them"
    if saved_too:
        assert [image["node_id"] for image in output["images"]] == ["9"]
        assert output["errors"] == [sentence]
    else:
        assert (output["code"], output["error"]) == ("output_missing", sentence)


def test_images_on_a_slow_connection_are_awaited(victim: EmulatedComfyUI, gate: Gate) -> None:
    with proxy_to(victim) as proxy, closing(Worker(shrunk(proxy.url))) as worker:
        running = RunningJob(worker, job(sent(gate, saved_too=True)))
        running.wait_for(lambda event: isinstance(event, NodeStarted) and event.node_id == "3")
        proxy.hold_websockets()
        gate.open()
        wait_until(lambda: victim.finished() != [])
        # The history has been asked several times by then.
        with pytest.raises(AssertionError, match="has not ended"):
            running.output(timeout_s=1)
        proxy.release_websockets()
        output = running.output()
    assert sorted(image["node_id"] for image in output["images"]) == ["8", "9"]
    assert "errors" not in output


def test_images_not_announced_before_the_end_are_awaited(
    victim: EmulatedComfyUI, gate: Gate, mocker: MockerFixture
) -> None:
    mocker.patch("comfy_worker.comfy.watch._FIRST_FRAME_S", 60.0)
    with proxy_to(victim) as proxy, closing(Worker(shrunk(proxy.url))) as worker:
        answers = mocker.spy(worker.client, "history")
        proxy.hold_websockets()
        running = RunningJob(worker, job(sent(gate, saved_too=True)))
        gate.wait_until_run()
        gate.open()
        wait_until(lambda: any(entry is not None for entry in answers.spy_return_list))
        proxy.release_websockets()
        output = running.output()
    assert sorted(image["node_id"] for image in output["images"]) == ["8", "9"]
    assert "errors" not in output


def test_possibly_missing_images_are_reported(victim: EmulatedComfyUI, gate: Gate) -> None:
    """One node has sent its picture before the websocket is lost; whether it had more to send nobody knows."""
    graph = sent(gate, saved_too=False)
    graph["8"]["inputs"]["images"] = ["1", 0]
    graph["9"] = gate.graph()["9"]
    with working(victim) as worker:
        running = RunningJob(worker, job(graph))
        running.wait_for(lambda event: isinstance(event, NodeFinished) and event.node_id == "8")
        lose(victim)
        gate.open()
        output = running.output()
    assert sorted(image["node_id"] for image in output["images"]) == ["8", "9"]
    assert output["errors"] == ["The websocket was lost meanwhile: images of SaveImageWebsocket nodes may be missing"]
