"""Modifiers: found by name, loaded again, run to an end, and a sentence for all that foreign code can do."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.modifiers import Modifiers, run_modifier
from comfy_worker.modifiers import BaseModifier, MissingValue, ModifierFailed, randomized
from tests.support.modifiers import workflow_made_by

ROOT = Path(__file__).parents[2]
PHOTO = "https://example.com/photo.png"
GRAPH: dict[str, Any] = {
    "3": {"class_type": "KSampler", "inputs": {"seed": "__RANDOM_INT__", "steps": 4, "noise": "__RANDOM_INT__"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
    "10": {"class_type": "LoadImage", "inputs": {"image": "there.png"}},
}

WRITTEN_ELSEWHERE = '''
from modifiers.basemodifier import BaseModifier
import random
import time


class Photo2Photo(BaseModifier):
    """Bound to one workflow file."""

    WORKFLOW_JSON = "workflows/photo.json"

    def __init__(self, modifications={}):
        super().__init__(modifications)

    async def apply_modifications(self):
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.workflow["3"]["inputs"]["seed"] = await self.modify_workflow_value(
            "seed", random.randint(0, 2**32))
        self.workflow["6"]["inputs"]["text"] = await self.modify_workflow_value(
            "prompt", "")
        self.workflow["10"]["inputs"]["image"] = await self.modify_workflow_value(
            "https://example.com/photo.png")
        await super().apply_modifications()
'''
"""In the shape of the contract's own description, import line and all."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an empty folder of modifiers, beside a folder with a workflow."""
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows/photo.json").write_text(json.dumps(GRAPH))
    (tmp_path / "modifiers").mkdir()
    return tmp_path / "modifiers"


@pytest.fixture
def modifiers(folder: Path) -> Modifiers:
    return Modifiers(folder)


def write(
    folder: Path, name: str, body: str, *, file: str | None = None, workflow: str = "workflows/photo.json"
) -> None:
    """Write a modifier whose `apply_modifications` has this body."""
    lines = "\n        ".join(body.splitlines())
    (folder / (file or f"{name.lower()}.py")).write_text(
        "import asyncio, sys, time\n"
        "from comfy_worker.errors import InvalidInput\n"
        "from comfy_worker.modifiers import BaseModifier\n"
        f"class {name}(BaseModifier):\n"
        f"    WORKFLOW_JSON = {workflow!r}\n"
        "    async def apply_modifications(self):\n"
        f"        {lines}\n"
    )


def failure(modifiers: Modifiers, name: str, **options: Any) -> ModifierFailed:
    with pytest.raises(ModifierFailed) as failed:
        workflow_made_by(modifiers, name, **options)
    assert failed.value.http_status == 500
    return failed.value


# ------------------------------------------------------------------------------------------------ the contract


@pytest.fixture
def written_elsewhere(folder: Path) -> None:
    (folder / "photo2photo.py").write_text(WRITTEN_ELSEWHERE)


@pytest.mark.usefixtures("written_elsewhere")
def test_a_modifier_written_for_ai_docks_wrapper_runs_as_it_is(modifiers: Modifiers) -> None:
    made = workflow_made_by(modifiers, "Photo2Photo", {"prompt": "a sunset", "steps": 30})
    seed, noise = made["3"]["inputs"]["seed"], made["3"]["inputs"]["noise"]
    assert 0 <= seed <= 2**32
    assert 0 <= noise < 2**32
    assert made == {
        "3": {"class_type": "KSampler", "inputs": {"seed": seed, "steps": 4, "noise": noise}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a sunset", "clip": ["4", 1]}},
        "10": {"class_type": "LoadImage", "inputs": {"image": PHOTO}},
    }


@pytest.mark.usefixtures("written_elsewhere")
def test_a_url_under_a_key_can_be_replaced(modifiers: Modifiers) -> None:
    made = workflow_made_by(modifiers, "Photo2Photo", {PHOTO: "https://example.com/other.png", "seed": 7})
    assert made["10"]["inputs"]["image"] == "https://example.com/other.png"
    assert made["3"]["inputs"]["seed"] == 7


def test_runs_do_not_share_their_workflow_or_the_callers_values(folder: Path, modifiers: Modifiers) -> None:
    write(folder, "Grows", "self.modifications['list'].append(1)\nself.workflow['list'] = self.modifications['list']")
    values: dict[str, Any] = {"list": []}
    assert workflow_made_by(modifiers, "Grows", values)["list"] == [1]
    assert workflow_made_by(modifiers, "Grows", values)["list"] == [1]
    assert values == {"list": []}


def test_a_modifier_without_a_workflow_file_loads_a_workflow_itself(folder: Path, modifiers: Modifiers) -> None:
    write(folder, "Any", "self.workflow['6']['inputs']['text'] = 'hello'", workflow="")
    with pytest.raises(ModifierFailed, match="Modifier Any has no WORKFLOW_JSON"):
        workflow_made_by(modifiers, "Any")
    with (folder / "any.py").open("a") as file:
        file.write(
            f"\n    async def load_workflow(self, workflow=None):\n        await super().load_workflow({GRAPH!r})\n"
        )
    assert workflow_made_by(modifiers, "Any")["6"]["inputs"]["text"] == "hello"


def test_a_modifier_can_override_the_methods_of_its_base(folder: Path, modifiers: Modifiers) -> None:
    (folder / "own.py").write_text(
        "from comfy_worker.modifiers import BaseModifier\n"
        "class Own(BaseModifier):\n"
        "    async def load_workflow(self, workflow=None):\n"
        "        self.workflow = {'1': {'seed': '__RANDOM_INT__'}}\n"
        "    async def get_modified_workflow(self):\n"
        "        return {'wrapped': await super().get_modified_workflow()}\n"
    )
    assert isinstance(workflow_made_by(modifiers, "Own")["wrapped"]["1"]["seed"], int)


@pytest.mark.parametrize("value", ["words", 0, 1.5, False, None, [], {"a": 1}])
def test_falsy_values_are_used(folder: Path, modifiers: Modifiers, value: Any) -> None:
    write(folder, "Takes", "self.workflow = {'value': await self.modify_workflow_value('value', 'default')}")
    assert workflow_made_by(modifiers, "Takes", {"value": value}) == {"value": value}
    assert workflow_made_by(modifiers, "Takes", {}) == {"value": "default"}


@pytest.mark.parametrize("arguments", ["'prompt'", "'prompt', None", "'prompt', default=None"])
def test_a_missing_value_is_named_with_its_modifier(folder: Path, modifiers: Modifiers, arguments: str) -> None:
    write(folder, "Needs", f"await self.modify_workflow_value({arguments})")
    with pytest.raises(MissingValue) as missing:
        workflow_made_by(modifiers, "Needs", {"Prompt": "spelled otherwise"})
    assert missing.value.as_output() == {
        "error": "Modifier Needs needs the value 'prompt'",
        "code": "invalid_input",
        "hint": "Send it as modifications.prompt",
    }
    assert missing.value.http_status == 400


def test_a_modifier_may_catch_that_a_value_is_missing(folder: Path, modifiers: Modifiers) -> None:
    body = "try:\n    await self.modify_workflow_value('a')\nexcept IndexError:\n    self.workflow = {'caught': True}"
    write(folder, "Catches", body)
    assert workflow_made_by(modifiers, "Catches") == {"caught": True}


def test_the_base_by_itself_has_no_workflow() -> None:
    assert BaseModifier().modifications == {}
    assert BaseModifier({"a": 1}).modifications == {"a": 1}


def test_ai_docks_url_methods(folder: Path, modifiers: Modifiers) -> None:
    write(
        folder,
        "Fetches",
        f"""url = {PHOTO!r}
self.workflow = {{
    "name": await self.get_url_content(url), "hash": self.get_url_hash(url),
    "is": self.is_url(url), "is not": [self.is_url("photo.png"), self.is_url(3)],
    "all": await self.replace_workflow_urls([url]),
}}""",
    )
    assert workflow_made_by(modifiers, "Fetches") == {
        "name": PHOTO,
        "hash": hashlib.md5(PHOTO.encode(), usedforsecurity=False).hexdigest(),
        "is": True,
        "is not": [False, False],
        "all": [PHOTO],
    }


@pytest.mark.parametrize("use", ["self.input_dir", "await self.download_file('http://a/b', self)"])
def test_uses_of_comfyuis_folder_are_reported(folder: Path, modifiers: Modifiers, use: str) -> None:
    write(folder, "Loads", use)
    error = failure(modifiers, "Loads")
    assert re.fullmatch(r"Modifier Loads uses \w+, but ComfyUI's folders are on another machine", error.message)
    assert error.hint == "Leave the URL in the workflow: the worker downloads it"


def test_a_modifier_may_set_the_bounds_of_its_random_integers(folder: Path, modifiers: Modifiers) -> None:
    (folder / "small.py").write_text(
        "from modifiers.basemodifier import BaseModifier\n"
        "class Small(BaseModifier):\n"
        "    WORKFLOW_JSON = 'workflows/photo.json'\n"
        "    RANDOM_INT_MIN = RANDOM_INT_MAX = 7\n"
    )
    assert workflow_made_by(modifiers, "Small")["3"]["inputs"] == {"seed": 7, "steps": 4, "noise": 7}


@pytest.mark.parametrize(
    ("reads", "unread"),
    [
        ("self.modifications['a']", ("b",)),
        ("self.modifications.get('b')", ("a",)),
        ("'a' in self.modifications and self.modifications.pop('b', 0)", ()),
        ("dict(self.modifications.items())", ()),
        ("list(self.modifications)", ()),
        ("sum(self.modifications.values())", ()),
        ("self.modifications = {'c': 1}", ()),
        ("pass", ("a", "b")),
    ],
)
def test_values_that_a_modifier_never_reads_are_noted(
    folder: Path, modifiers: Modifiers, reads: str, unread: tuple[str, ...]
) -> None:
    write(folder, "Reads", reads)
    assert run_modifier(modifiers, "Reads", {"a": 1, "b": 2}).unread == unread


# ------------------------------------------------------------------------------------------------ random integers

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["__RANDOM_INT__", "a__RANDOM_INT__b"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def same(before: Any, after: Any) -> bool:
    """Return whether one value is the other with numbers where it had placeholders."""
    if isinstance(before, dict):
        return list(before) == list(after) and all(same(item, after[key]) for key, item in before.items())
    if isinstance(before, list):
        return len(before) == len(after) and all(map(same, before, after))
    if before == "__RANDOM_INT__":
        return type(after) is int and 0 <= after < 2**32
    if before == "a__RANDOM_INT__b":
        return re.fullmatch(r"a\d{1,10}b", after) is not None
    return type(before) is type(after) and bool(before == after)


@given(workflow=JSON)
def test_placeholders_become_numbers_and_nothing_else_changes(workflow: Any) -> None:
    before = json.dumps(workflow)
    assert same(workflow, randomized(workflow))
    assert json.dumps(workflow) == before, "the given one is left as it was"


def test_each_placeholder_gets_a_number_of_its_own() -> None:
    drawn = randomized({"1": {"inputs": {"seeds": ["__RANDOM_INT__"] * 20, "name": "__RANDOM_INT__-__RANDOM_INT__"}}})
    inputs = drawn["1"]["inputs"]
    assert len(set(inputs["seeds"])) > 15
    first, second = str(inputs["name"]).split("-")
    assert first.isdigit() and second.isdigit()


@pytest.mark.parametrize("text", ["draw a random int", "RANDOM_INT", "_RANDOM_INT_", "__random_int__", ""])
def test_lookalikes_of_the_placeholder_are_kept(text: str) -> None:
    assert randomized({"text": text}) == {"text": text}


# ------------------------------------------------------------------------------------------------ finding them


def test_an_unknown_modifier_suggests_the_nearest_one(folder: Path, modifiers: Modifiers) -> None:
    write(folder, "Portrait", "pass")
    with pytest.raises(InvalidInput) as unknown:
        workflow_made_by(modifiers, "Potrait")
    assert unknown.value.message == "There is no modifier 'Potrait'; did you mean 'Portrait'?"
    assert unknown.value.hint is None


def test_a_missing_folder_has_no_modifiers(tmp_path: Path) -> None:
    modifiers = Modifiers(tmp_path / "nowhere")
    assert modifiers.names() == []
    with pytest.raises(InvalidInput, match=r"^There is no modifier 'A'$"):
        modifiers.find("A")


def test_only_modifiers_that_a_file_defines_are_found(folder: Path, modifiers: Modifiers) -> None:
    (folder / "several.py").write_text(
        "from collections import OrderedDict\n"
        "from comfy_worker.modifiers import BaseModifier\n"
        "class Helper: pass\n"
        "class First(BaseModifier): pass\n"
        "class Second(First): pass\n"
        "Alias = First\n"
        "value = 7\n"
    )
    (folder / "_private.py").write_text("raise RuntimeError('not for anybody')")
    (folder / "__init__.py").write_text("")
    (folder / "notes.txt").write_text("no Python")
    assert modifiers.names() == ["First", "Second"]
    for name in ("BaseModifier", "Helper", "OrderedDict", "Alias", "value", "__class__", ""):
        with pytest.raises(InvalidInput):
            modifiers.find(name)


def test_modifier_files_are_not_importable_modules(folder: Path, modifiers: Modifiers) -> None:
    write(folder, "Json", "pass", file="json.py")
    module = modifiers.find("Json").modifier.__module__
    assert module.startswith("_comfy_worker_modifier_json_")
    assert sys.modules["json"] is json
    assert not list(folder.glob("__pycache__"))


def test_the_same_file_name_in_two_folders_makes_two_modifiers(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    write(folder, "Which", "self.workflow = {'from': 1}")
    write(tmp_path / "others", "Which", "self.workflow = {'from': 2}")
    here, there = Modifiers(folder), Modifiers(tmp_path / "others")
    assert [workflow_made_by(here, "Which"), workflow_made_by(there, "Which"), workflow_made_by(here, "Which")] == [
        {"from": 1},
        {"from": 2},
        {"from": 1},
    ]


def test_the_first_of_two_equal_names_wins_with_a_log_line(
    folder: Path, modifiers: Modifiers, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, "Twice", "self.workflow = {'from': 'a'}", file="a.py")
    write(folder, "Twice", "self.workflow = {'from': 'b'}", file="b.py")
    assert workflow_made_by(modifiers, "Twice") == workflow_made_by(modifiers, "Twice") == {"from": "a"}
    assert caplog.messages == ["The modifier Twice in b.py is ignored, because a.py has one too"]


def test_a_file_that_changes_is_loaded_again_even_within_the_same_second_and_size(
    folder: Path, modifiers: Modifiers
) -> None:
    for turn in range(10):
        write(folder, "Turn", f"self.workflow = {{'turn': {turn}}}")
        assert workflow_made_by(modifiers, "Turn") == {"turn": turn}


def test_a_file_that_did_not_change_is_not_loaded_again(folder: Path, modifiers: Modifiers) -> None:
    write(folder, "Same", "pass")
    assert modifiers.find("Same").modifier is modifiers.find("Same").modifier


def test_a_removed_file_removes_its_modifiers(folder: Path, modifiers: Modifiers) -> None:
    write(folder, "Gone", "pass")
    module = modifiers.find("Gone").modifier.__module__
    (folder / "gone.py").unlink()
    assert modifiers.names() == []
    assert module not in sys.modules


BROKEN = {
    "def broken(:\n": "line 1: SyntaxError: invalid syntax",
    "\nimport a_package_that_is_nowhere\n": "line 2: ModuleNotFoundError: No module named 'a_package_that_is_nowhere'",
    "raise SystemExit(3)\n": "line 1: SystemExit",
    "x = 1\n\nx / 0\n": "line 3: ZeroDivisionError",
    "raise ValueError('the password is hunter2')\n": "line 1: ValueError",
}


@pytest.mark.parametrize(("source", "words"), BROKEN.items(), ids=BROKEN.values())
def test_a_broken_file_is_logged_once_and_does_not_affect_others(
    folder: Path, modifiers: Modifiers, caplog: pytest.LogCaptureFixture, source: str, words: str
) -> None:
    (folder / "broken.py").write_text(source)
    write(folder, "Fine", "pass")
    assert modifiers.names() == modifiers.names() == ["Fine"]
    assert caplog.messages == [f"A modifier file could not be loaded: broken.py, {words}"]
    with pytest.raises(InvalidInput) as unknown:
        modifiers.find("Other")
    assert unknown.value.hint == f"These files could not be loaded: broken.py, {words}"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("several.py", "import nowhere_to_be_found\nclass Portrait(Base): pass\n"),
        ("portrait.py", "import nowhere_to_be_found\n"),
    ],
)
def test_an_unloadable_modifier_is_reported_with_location_and_reason(
    folder: Path, modifiers: Modifiers, file: str, source: str
) -> None:
    (folder / file).write_text(source)
    error = failure(modifiers, "Portrait")
    reason = "ModuleNotFoundError: No module named 'nowhere_to_be_found'"
    assert error.message == f"Modifier Portrait could not be loaded: {file}, line 1: {reason}"


def test_a_reason_names_no_path(folder: Path, modifiers: Modifiers) -> None:
    (folder / "leaks.py").write_text(f"raise ImportError({str(folder / 'deep/secret.py')!r})\n")
    assert str(folder.parent) not in failure(modifiers, "Leaks").message
    assert "secret.py" in failure(modifiers, "Leaks").message


def test_ai_docks_own_base_in_the_folder_is_left_out(folder: Path, modifiers: Modifiers) -> None:
    (folder / "basemodifier.py").write_text("from config import INPUT_DIR\n")
    (folder / "own.py").write_text(
        "import modifiers.basemodifier\n"
        "class Own(modifiers.basemodifier.BaseModifier):\n"
        "    WORKFLOW_JSON = 'workflows/photo.json'\n"
    )
    assert set(workflow_made_by(modifiers, "Own")) == set(GRAPH)


def test_a_file_that_cannot_be_read_is_logged_once(
    folder: Path, modifiers: Modifiers, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "folder.py").mkdir()
    assert modifiers.names() == modifiers.names() == []
    assert caplog.messages == ["A modifier file could not be loaded: folder.py: IsADirectoryError"]


def test_a_repaired_file_works(folder: Path, modifiers: Modifiers) -> None:
    (folder / "mended.py").write_text("class")
    assert modifiers.names() == []
    write(folder, "Mended", "pass")
    assert modifiers.names() == ["Mended"]


def test_threads_share_a_modifier_and_load_its_file_once(folder: Path, modifiers: Modifiers) -> None:
    write(folder, "Shared", "self.workflow = {'mine': await self.modify_workflow_value('mine')}")
    with ThreadPoolExecutor(8) as threads:
        classes = set(threads.map(lambda _: modifiers.find("Shared").modifier, range(40)))
        made = list(threads.map(lambda turn: workflow_made_by(modifiers, "Shared", {"mine": turn}), range(40)))
    assert len(classes) == 1
    assert made == [{"mine": turn} for turn in range(40)]


# ------------------------------------------------------------------------------------------------ its workflow


@pytest.mark.parametrize("place", ["modifiers", ".", "current", "catalog"])
def test_workflow_search_path(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    root = folder.parent
    for name in ("current", "catalog"):
        (root / name).mkdir()
    monkeypatch.chdir(root / "current")
    (root / place / "here.json").write_text('{"found": 1}')
    write(folder, "Looks", "pass", workflow="here.json")
    assert workflow_made_by(Modifiers(folder, [root / "catalog"]), "Looks") == {"found": 1}


def test_a_workflow_may_have_an_absolute_path(folder: Path, modifiers: Modifiers, tmp_path: Path) -> None:
    write(folder, "Absolute", "pass", workflow=str(tmp_path / "workflows/photo.json"))
    assert set(workflow_made_by(modifiers, "Absolute")) == set(GRAPH)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not find its workflow own.json"),
        ("{", "cannot read its workflow own.json"),
        ("[1]", "has a workflow that is not an object of nodes: own.json"),
    ],
)
def test_a_workflow_that_cannot_be_used(folder: Path, modifiers: Modifiers, content: str | None, words: str) -> None:
    write(folder, "Lost", "pass", workflow="deep/own.json")
    if content is not None:
        (folder / "deep").mkdir()
        (folder / "deep/own.json").write_text(content)
    assert failure(modifiers, "Lost").message == f"Modifier Lost {words}"


# ------------------------------------------------------------------------------------------------ when it fails

RAISES = {
    "self.workflow['99']": "KeyError: '99' is missing",
    "self.modifications['prompt']": "KeyError: 'prompt' is missing",
    "raise ValueError('the password is hunter2')": "ValueError",
    "raise TimeoutError('of its own')": "TimeoutError",
    "raise asyncio.TimeoutError": "TimeoutError",
    "raise asyncio.CancelledError": "CancelledError",
    "sys.exit(1)": "SystemExit",
    "self.nothing()": "AttributeError",
}


@pytest.mark.parametrize(("body", "kind"), RAISES.items(), ids=RAISES.keys())
def test_every_exception_becomes_one_sentence(
    folder: Path, modifiers: Modifiers, caplog: pytest.LogCaptureFixture, body: str, kind: str
) -> None:
    write(folder, "Raises", body)
    error = failure(modifiers, "Raises")
    assert error.as_output() == {"error": f"Modifier Raises failed with {kind}", "code": "modifier_failed"}
    assert error.__cause__ is None and error.__suppress_context__
    name = kind.partition(":")[0]
    gc.collect()  # asyncio complains of an error that nobody fetched when the task is thrown away
    assert caplog.messages == [f"The modifier Raises failed: {name} in line 7 of raises.py"]
    assert str(folder) not in caplog.text and "hunter2" not in caplog.text


def test_failures_before_the_workflow_is_loaded_are_reported(folder: Path, modifiers: Modifiers) -> None:
    (folder / "early.py").write_text(
        "from comfy_worker.modifiers import BaseModifier\nclass Early(BaseModifier):\n    def __init__(self): pass\n"
    )
    assert failure(modifiers, "Early").message == "Modifier Early failed with TypeError"


def test_a_modifier_can_reject_a_value_with_its_own_message(folder: Path, modifiers: Modifiers) -> None:
    write(folder, "Refuses", "raise InvalidInput('steps must be 1 to 50', hint='Try 20', details={'steps': 99})")
    with pytest.raises(InvalidInput) as refused:
        workflow_made_by(modifiers, "Refuses")
    assert refused.value.as_output() == {
        "error": "Modifier Refuses: steps must be 1 to 50",
        "code": "invalid_input",
        "hint": "Try 20",
        "details": {"steps": 99},
    }


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ("None", "a NoneType instead of a workflow"),
        ("[]", "a list instead of a workflow"),
        ("{'1': {1, 2}}", "a workflow that is not JSON"),
        ("{'1': float('nan')}", "a workflow that is not JSON"),
        ("{'1': 10**400}", "a workflow that is not JSON"),
        ("{'1': self}", "a workflow that is not JSON"),
    ],
)
def test_the_result_must_be_json(folder: Path, modifiers: Modifiers, made: str, words: str) -> None:
    write(folder, "Makes", f"self.workflow = {made}")
    assert failure(modifiers, "Makes").message == f"Modifier Makes returned {words}"


def test_a_modifier_that_awaits_too_long_is_cancelled(
    folder: Path, modifiers: Modifiers, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, "Waits", "try:\n    await asyncio.Event().wait()\nfinally:\n    type(self).ended.set()")
    ended = threading.Event()
    modifiers.find("Waits").modifier.ended = ended  # type: ignore[attr-defined]
    assert failure(modifiers, "Waits", timeout_s=0.05).message == "Modifier Waits took longer than 0.05 s"
    assert ended.wait(30)
    assert caplog.messages == ["The modifier Waits in waits.py took longer than 0.05 s"]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Yield what a modifier waits for that blocks; it opens when the test ends."""
    gate = threading.Event()
    yield gate
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "modifier-Blocks":
            thread.join(30)


@pytest.mark.parametrize(
    "body", ["type(self).gate.wait()", "while not type(self).gate.is_set():\n    time.sleep(0.01)"]
)
def test_a_modifier_that_blocks_its_thread_is_abandoned(
    folder: Path, modifiers: Modifiers, gate: threading.Event, body: str
) -> None:
    write(folder, "Blocks", body)
    modifiers.find("Blocks").modifier.gate = gate  # type: ignore[attr-defined]
    assert failure(modifiers, "Blocks", timeout_s=0.05).message == "Modifier Blocks took longer than 0.05 s"
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "modifier-Blocks")


def test_a_modifier_runs_in_its_callers_context(folder: Path, modifiers: Modifiers) -> None:
    job_id: ContextVar[str] = ContextVar("job_id")
    job_id.set("job-7")
    write(folder, "Logs", "self.workflow = {'job': type(self).job_id.get()}")
    modifiers.find("Logs").modifier.job_id = job_id  # type: ignore[attr-defined]
    assert workflow_made_by(modifiers, "Logs") == {"job": "job-7"}


def test_nothing_is_logged_on_success(folder: Path, modifiers: Modifiers, caplog: pytest.LogCaptureFixture) -> None:
    write(folder, "Quiet", "await super().apply_modifications()")
    with caplog.at_level(logging.INFO):
        workflow_made_by(modifiers, "Quiet")
    assert caplog.messages == []


# ------------------------------------------------------------------------------------------------ the documentation


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs/how-to/modifiers.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_the_first_documented_example_needs_no_file() -> None:
    asked = json.loads(blocks("json")[0])["input"]
    made = workflow_made_by(Modifiers(ROOT / "modifiers"), asked["modifier"], asked["modifications"])
    assert "a lighthouse" in json.dumps(made)


def test_the_documented_modifier_names_missing_values(folder: Path) -> None:
    [source] = blocks("python")
    (folder / "postcard.py").write_text(source)
    with pytest.raises(MissingValue, match="Modifier Postcard needs the value 'photo'"):
        workflow_made_by(Modifiers(folder, [ROOT]), "Postcard")
