"""RunPod's `input` and `output`: what is taken, what is refused and with which sentence, what comes back."""

from __future__ import annotations

import base64
import json
import re
import uuid
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from comfy_worker.errors import InvalidInput, InvalidWorkflow, UiFormatWorkflow, WorkerError
from comfy_worker.job.input_files import UPLOAD_FAILED, decode_base64
from comfy_worker.job.payload import (
    failure_as_output,
    input_warnings,
    parse_job,
    result_as_output,
    split_failure,
    unknown_keys,
    webhook_of,
    workflow_of,
)
from comfy_worker.names import check_name
from comfy_worker.types import (
    Artifact,
    Delivered,
    Delivery,
    InputFile,
    Job,
    JobResult,
    Kind,
    OutputFile,
    OutputText,
    Timings,
)

WORKFLOW: dict[str, Any] = {
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a beautiful landscape", "clip": ["30", 1]}},
    "30": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "flux1-dev-fp8.safetensors"}},
}
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
JARGON = re.compile(
    r"[Ii]nput should|[Ff]ield required|dictionary|instance of|_\w*Input|dict\[|\bstr\b|pydantic|Value error"
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def parse(**fields: Any) -> Job:
    return parse_job({"id": "job-1", "input": {"workflow": WORKFLOW, **fields}})


def refused(**fields: Any) -> str:
    with pytest.raises(InvalidInput) as refusal:
        parse(**fields)
    assert not JARGON.search(refusal.value.message)
    return refusal.value.message


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


# ------------------------------------------------------------------------------------------- what is taken


def test_the_request_of_the_documentation() -> None:
    job = parse_job(
        {
            "id": "sync-uuid-string",
            "input": {
                "workflow": WORKFLOW,
                "images": [{"name": "input.png", "image": f"data:image/png;base64,{encoded(PIXEL)}"}],
            },
        }
    )
    assert job.id == "sync-uuid-string"
    assert job.workflow == WORKFLOW
    assert job.files == (InputFile("input.png", PIXEL),)
    assert (job.delivery, job.timeout_s, job.strict, job.include_previews) == (Delivery(), None, False, False)
    assert (job.comfy_org_api_key, job.extra_data, job.warnings) == (None, {}, ())


def test_every_job_gets_its_own_prompt_id() -> None:
    first, second = parse(), parse()
    assert uuid.UUID(first.prompt_id) != uuid.UUID(second.prompt_id)


def test_a_job_without_id_is_a_local_run() -> None:
    assert parse_job({"input": {"workflow": WORKFLOW}}).id == "local_test"


@pytest.mark.parametrize("workflow", [WORKFLOW, {"prompt": WORKFLOW}, {"prompt": WORKFLOW, "client_id": "x"}])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_workflow_comes_as_an_object_or_a_string_bare_or_wrapped(workflow: dict[str, Any], as_text: bool) -> None:
    assert parse(workflow=json.dumps(workflow) if as_text else workflow).workflow == WORKFLOW


def test_the_whole_input_may_be_a_json_string() -> None:
    assert parse_job({"input": json.dumps({"workflow": WORKFLOW, "strict": True})}).strict


def test_every_field() -> None:
    job = parse(
        delivery={"type": "s3", "prefix": "/shop/42/", "expires_s": 60},
        timeout_s=30,
        strict=True,
        retry_on_crash=True,
        include_previews=True,
        comfy_org_api_key="comfyui-key",
        extra_data={"extra_pnginfo": {"workflow": {}}},
    )
    assert job.delivery == Delivery("s3", "shop/42", 60)
    assert (job.timeout_s, job.strict, job.retry_on_crash, job.include_previews) == (30, True, True, True)
    assert job.comfy_org_api_key == "comfyui-key"
    assert job.extra_data == {"extra_pnginfo": {"workflow": {}}}
    assert "comfyui-key" not in repr(job)


def test_the_api_keys_other_name() -> None:
    assert parse(api_key_comfy_org="comfyui-key").comfy_org_api_key == "comfyui-key"


@pytest.mark.parametrize(
    ("policy", "seconds"),
    [
        ({"executionTimeout": 600_000, "ttl": 86_400_000}, 600.0),
        ({"executionTimeout": 1500.5}, 1.5005),
        ({"executionTimeout": 0}, None),
        ({"executionTimeout": None}, None),
        ({"executionTimeout": "soon"}, None),
        ({}, None),
        (None, None),
        ("strict", None),
    ],
)
def test_the_platforms_limit_counts_in_milliseconds(policy: object, seconds: float | None) -> None:
    job = parse_job({"id": "job-1", "input": {"workflow": WORKFLOW}, "policy": policy})
    assert job.execution_timeout_s == seconds


@pytest.mark.parametrize(
    "field", ["images", "files", "delivery", "timeout_s", "strict", "extra_data", "comfy_org_api_key"]
)
def test_null_counts_as_omitted(field: str) -> None:
    assert parse(**{field: None}).warnings == ()


def test_files_is_a_synonym_of_images() -> None:
    job = parse(
        images=[{"name": "a.png", "image": encoded(b"a")}, {"name": "poses/b.png", "image": encoded(b"b")}],
        files=[{"name": "c.wav", "image": encoded(b"c")}],
    )
    assert job.files == (InputFile("a.png", b"a"), InputFile("poses/b.png", b"b"), InputFile("c.wav", b"c"))
    assert "content" not in repr(job.files)


# --------------------------------------------------------------------------------------- unknown keys warn


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"image": []}, "input.image is unknown and was ignored; did you mean 'images'?"),
        ({"delivry": {}}, "input.delivry is unknown and was ignored; did you mean 'delivery'?"),
        (
            {"api_key_comfyorg": "k"},
            "input.api_key_comfyorg is unknown and was ignored; did you mean 'api_key_comfy_org'?",
        ),
        ({"zzz": 1}, "input.zzz is unknown and was ignored"),
        ({"delivery": {"prefx": "a"}}, "input.delivery.prefx is unknown and was ignored; did you mean 'prefix'?"),
        (
            {"files": [{"name": "a", "image": "YQ==", "nmae": "b"}]},
            "input.files.0.nmae is unknown and was ignored; did you mean 'name'?",
        ),
        (
            {"comfy_org_api_key": "a", "api_key_comfy_org": "b"},
            "input.api_key_comfy_org was ignored because input.comfy_org_api_key is set",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(fields: dict[str, Any], warning: str) -> None:
    assert parse(**fields).warnings == (warning,)


@given(st.dictionaries(st.text(max_size=12), st.integers(-5, 5) | st.text() | st.lists(st.booleans()), max_size=4))
def test_every_unknown_key_is_reported(fields: dict[str, Any]) -> None:
    unknown = {f"x-{key}": value for key, value in fields.items()}
    warnings = parse(**unknown).warnings
    assert len(warnings) == len(unknown)
    assert all(warning.startswith(f"input.{key} ") for warning, key in zip(warnings, unknown, strict=True))


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given_input", "sentence"),
    [
        (None, "Please provide input"),
        ("{", "Invalid JSON format in input"),
        ("[" * 100_000, "Invalid JSON format in input"),
        ([], "input must be an object with a workflow"),
        ("[]", "input must be an object with a workflow"),
        (7, "input must be an object with a workflow"),
        ({}, "Missing 'workflow' parameter"),
        ({"workflow": None}, "Missing 'workflow' parameter"),
        ({"prompt": WORKFLOW}, "Missing 'workflow' parameter"),
        ({"workflow": []}, "input.workflow must be an object"),
        ({"workflow": 5}, "input.workflow must be an object"),
    ],
)
def test_invalid_inputs(given_input: object, sentence: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        parse_job({"id": "job-1", "input": given_input})
    assert refusal.value.message == sentence
    assert refusal.value.as_output()["code"] == "invalid_input"


@pytest.mark.parametrize("job", [{}, {"id": "job-1"}])
def test_a_job_without_input(job: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="Please provide input"):
        parse_job(job)


@pytest.mark.parametrize(
    ("workflow", "sentence"),
    [
        ("{", "the workflow is a string that is not JSON"),
        ("[" * 100_000, "the workflow is a string that nests deeper than 200 levels"),
        ("[" * 201 + "]" * 201, "the workflow is a string that nests deeper than 200 levels"),
        ('{"1": 1e400}', "the workflow is a string that has NaN, Infinity or a number that is too large"),
        ("[1]", "the workflow is a list, not an object of nodes"),
        ('"x"', "the workflow is a string, not an object of nodes"),
        ("null", "the workflow is a null, not an object of nodes"),
        ({}, "the workflow has no nodes"),
        ({"prompt": {}}, "the workflow has no nodes"),
    ],
)
def test_invalid_workflows(workflow: object, sentence: str) -> None:
    with pytest.raises(InvalidWorkflow) as refusal:
        parse(workflow=workflow)
    assert refusal.value.message == f"Workflow validation failed: {sentence}"


def test_a_canvas_workflow_is_explained() -> None:
    with pytest.raises(UiFormatWorkflow) as refusal:
        parse(workflow={"nodes": [], "links": [], "version": 0.4})
    assert "Export (API)" in refusal.value.as_output()["hint"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"images": {}}, f"{UPLOAD_FAILED}: input.images must be a list"),
        ({"images": ["SECRET"]}, f"{UPLOAD_FAILED}: input.images.0 must be an object"),
        ({"images": [{}]}, f"{UPLOAD_FAILED}: input.images.0.name is missing"),
        (
            {"images": [{"name": "a", "image": "YQ=="}, {"name": 5, "image": "YQ=="}]},
            f"{UPLOAD_FAILED}: input.images.1.name must be a string",
        ),
        ({"files": [{"name": "a", "image": ["SECRET"]}]}, f"{UPLOAD_FAILED}: input.files.0.image must be a string"),
        ({"timeout_s": "SECRET"}, "input.timeout_s must be a number"),
        ({"timeout_s": True}, "input.timeout_s must be a number"),
        ({"timeout_s": 0}, "input.timeout_s must be greater than 0"),
        ({"timeout_s": float("inf")}, "The job has NaN, Infinity or a number that is too large"),
        ({"strict": "SECRET"}, "input.strict must be true or false"),
        ({"include_previews": 1}, "input.include_previews must be true or false"),
        ({"delivery": "SECRET"}, "input.delivery must be an object"),
        ({"delivery": {"type": "SECRET"}}, "input.delivery.type must be 'auto', 'base64', 's3', 'both' or 'local'"),
        ({"delivery": {"expires_s": True}}, "input.delivery.expires_s must be a whole number"),
        ({"delivery": {"expires_s": 0}}, "input.delivery.expires_s must be greater than or equal to 1"),
        ({"delivery": {"expires_s": 604801}}, "input.delivery.expires_s must be less than or equal to 604800"),
        ({"delivery": {"prefix": 5}}, "input.delivery.prefix must be a string"),
        ({"comfy_org_api_key": 5}, "input.comfy_org_api_key must be a string"),
        ({"extra_data": []}, "input.extra_data must be an object"),
        (
            {"strict": 1, "delivery": {"expires_s": "1"}},
            "input.delivery.expires_s must be a whole number; input.strict must be true or false",
        ),
    ],
)
def test_wrong_types_are_named_by_path_without_the_value(fields: dict[str, Any], sentence: str) -> None:
    message = refused(**fields)
    assert message == sentence
    assert "SECRET" not in message


@pytest.mark.parametrize("prefix", ["../a", "a/../b", "a//b", "C:/a", "a\\b", "a\nb", "/"])
def test_a_prefix_stays_below_the_bucket(prefix: str) -> None:
    assert refused(delivery={"prefix": prefix}).startswith("input.delivery.prefix ")


@given(
    st.dictionaries(st.sampled_from(["workflow", "images", "files", "delivery", "timeout_s", "strict"]), json_values)
)
@example({"workflow": {"a": {"class_type": "A", "inputs": {}}}, "images": [{"name": "\ud800", "image": ""}]})
def test_any_input_is_a_job_or_an_error(payload: dict[str, Any]) -> None:
    try:
        job = parse_job({"input": payload})
    except WorkerError as refusal:
        output = refusal.as_output()
        assert output["error"]
        assert output["code"] in ("invalid_input", "invalid_workflow", "ui_format_workflow")
        assert not JARGON.search(output["error"].replace(repr(payload), ""))
    else:
        assert isinstance(job, Job)


# --------------------------------------------------------------------------------------------------- base64


@pytest.mark.parametrize(
    "head",
    ["", "data:image/png;base64,", "DATA:IMAGE/PNG;BASE64,", "data:;base64,", "data:text/plain;charset=utf-8;base64,"],
)
@given(content=st.binary(min_size=1, max_size=200))
def test_bytes_survive_with_and_without_data_uri(head: str, content: bytes) -> None:
    assert decode_base64(head + encoded(content), "a.png") == content


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("image/png;base64,YWJj", b"abc"),
        ("data:image/png,YWJj", b"abc"),
        ("anything,YWJj", b"abc"),
        ("YQ", b"a"),
        ("YQ=", b"a"),
        ("data:image/png;base64,YWI", b"ab"),
        ("-_-_", b"\xfb\xff\xbf"),
        ("+/-_", b"\xfb\xff\xbf"),
    ],
)
def test_base64_is_accepted_as_in_worker_comfyui(text: str, content: bytes) -> None:
    assert decode_base64(text, "a.png") == content


@given(content=st.binary(min_size=1, max_size=200), data=st.data())
def test_line_breaks_and_spaces_do_not_matter(content: bytes, data: st.DataObject) -> None:
    text = list(encoded(content))
    for _ in range(data.draw(st.integers(0, 6))):
        text.insert(data.draw(st.integers(0, len(text))), data.draw(st.sampled_from(["\n", "\r\n", " ", "\t"])))
    assert decode_base64("data:image/png;base64," + "".join(text), "a.png") == content


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("@@@@", "is not valid base64"),
        ("data:image/png;base64,@@@@", "is not valid base64"),
        ("iVBORw0KGgo;", "is not valid base64"),
        ("iVBOR", "is not valid base64"),
        ("image/png;base64,@@@@", "is not valid base64"),
        ("YQ==YQ==", "is not valid base64"),
        ("=", "is not valid base64"),
        ("bilde ä", "is not valid base64"),
        ("\ud800YQ==", "is not valid base64"),
        ("YQ==\0", "is not valid base64"),
        ("", "is empty"),
        (" \r\n\t", "is empty"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64, \n", "is empty"),
        ("data:image/svg+xml,%3Csvg/%3E", "is a data URI that is not base64"),
        ("data:text/plain,hello", "is a data URI that is not base64"),
        ("data:image/png;base64;YQ==", "is a data URI without a comma before its data"),
    ],
)
def test_invalid_images_are_rejected_by_name(text: str, why: str) -> None:
    assert refused(images=[{"name": "poses/in.png", "image": text}]) == f"{UPLOAD_FAILED}: Image 'poses/in.png' {why}"


@given(st.text(max_size=40))
def test_any_text_is_bytes_or_an_error(text: str) -> None:
    try:
        content = decode_base64(text, "a.png")
    except InvalidInput as refusal:
        assert refusal.message.startswith("Image 'a.png' is ")
    else:
        assert content


# ---------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    [
        "a.png",
        "a b.png",
        "poses/deep/a.png",
        "日本 語.png",
        "ä/é.png",
        ".hidden",
        "a..b.png",
        "...",
        "~a",
        "a [b].png",
        "x" * 255,
        "日" * 85,
    ],
)
def test_names_that_stay_in_their_folder(name: str) -> None:
    assert check_name(name, "Image name") == name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "it is empty"),
        (" \u3000", "it is empty"),
        ("/etc/passwd", "it must be relative, with '/' between folders"),
        ("C:/a.png", "it must be relative, with '/' between folders"),
        ("c:a.png", "it must be relative, with '/' between folders"),
        ("file://a.png", "it must be relative, with '/' between folders"),
        ("..\\a.png", "it must be relative, with '/' between folders"),
        ("a\\b.png", "it must be relative, with '/' between folders"),
        ("..", "it must not leave its folder or have empty parts"),
        ("../a.png", "it must not leave its folder or have empty parts"),
        ("a/../../b.png", "it must not leave its folder or have empty parts"),
        ("a/./b.png", "it must not leave its folder or have empty parts"),
        ("a//b.png", "it must not leave its folder or have empty parts"),
        ("a/", "it must not leave its folder or have empty parts"),
        ("a\0.png", "it has control characters"),
        ("a\r\nb.png", "it has control characters"),
        ("a\x7f.png", "it has control characters"),
        ("a.png [input]", "annotations such as ' [input]' are allowed only in the workflow"),
        ("a.png [temp]", "annotations such as ' [input]' are allowed only in the workflow"),
        ("a.png[output]", "annotations such as ' [input]' are allowed only in the workflow"),
        ("\ud800.png", "it is not valid Unicode"),
    ],
)
def test_names_that_would_leave_are_rejected(name: str, why: str) -> None:
    message = refused(images=[{"name": name, "image": "YQ=="}])
    assert message == f"{UPLOAD_FAILED}: Image name {name!r} is refused: {why}"
    json.dumps(message, ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize("name", ["x" * 256, "日" * 86, f"a/{'x' * 256}/b.png", "x" * 1_000_000])
def test_an_overlong_name_is_truncated_in_the_error(name: str) -> None:
    message = refused(images=[{"name": name, "image": "YQ=="}])
    assert message == f"{UPLOAD_FAILED}: Image name {name[:40]!r}… is refused: a part of it is longer than 255 bytes"


@given(
    st.lists(st.sampled_from(["..", ".", "/", "\\", "a", "b.png", "C:", "~", "\0", " ", "[input]"]), max_size=6).map(
        "".join
    )
    | st.text(max_size=20)
)
def test_accepted_names_stay_in_their_folder(name: str) -> None:
    try:
        check_name(name, "Image name")
    except InvalidInput:
        return
    parts = name.split("/")
    assert not {"", ".", ".."} & set(parts)
    assert not PurePosixPath(name).is_absolute()
    assert not PureWindowsPath(name).anchor
    assert len(PureWindowsPath(name).parts) == len(parts)
    assert "\0" not in name
    assert not name.endswith(("[input]", "[output]", "[temp]"))
    assert all(len(part.encode()) <= 255 for part in parts)


def test_two_files_of_one_name() -> None:
    images = [{"name": "a.png", "image": "YQ=="}]
    assert refused(images=images, files=images) == f"{UPLOAD_FAILED}: Two images are named 'a.png'"


# --------------------------------------------------------------------------------------------------- output


def artifact(filename: str, kind: Kind, **changes: Any) -> Artifact:
    file = OutputFile(filename, "job/sub", changes.pop("type", "output"), kind, "9", "SaveImage", "Save", 0)
    return Artifact(file, "sub", Delivered("base64", "YQ=="), "image/png", 1, **changes)


def result(*artifacts: Artifact, texts: tuple[OutputText, ...] = (), warnings: tuple[str, ...] = ()) -> JobResult:
    return JobResult("prompt-1", artifacts, texts, warnings, Timings(1, 2, 3, 4, 10))


TIMINGS = {"staged_ms": 1, "queued_ms": 2, "executed_ms": 3, "delivered_ms": 4, "total_ms": 10}


def test_an_image_is_returned_with_all_metadata() -> None:
    output = result_as_output(result(artifact("a.png", Kind.IMAGE, width=64, height=32)))
    assert output == {
        "images": [
            {
                "filename": "a.png",
                "type": "base64",
                "data": "YQ==",
                "subfolder": "sub",
                "node_id": "9",
                "class_type": "SaveImage",
                "title": "Save",
                "index": 0,
                "preview": False,
                "mime_type": "image/png",
                "size_bytes": 1,
                "width": 64,
                "height": 32,
            }
        ],
        "prompt_id": "prompt-1",
        "timings": TIMINGS,
    }


def test_no_outputs_is_a_success_without_images() -> None:
    assert result_as_output(result()) == {
        "images": [],
        "status": "success_no_images",
        "prompt_id": "prompt-1",
        "timings": TIMINGS,
    }


def test_every_kind_has_its_list_and_images_is_always_there() -> None:
    clip, sound, mesh = artifact("a.mp4", Kind.VIDEO), artifact("a.flac", Kind.AUDIO), artifact("a.glb", Kind.FILE)
    output = result_as_output(result(clip, sound, mesh))
    assert output["images"] == []
    assert "status" not in output
    assert [output[kind][0]["filename"] for kind in ("videos", "audio", "files")] == ["a.mp4", "a.flac", "a.glb"]
    assert "width" not in output["videos"][0]


def test_texts_and_warnings() -> None:
    text = OutputText("41", "PreviewAny", "Look", "seen")
    output = result_as_output(result(texts=(text,), warnings=("Something was odd",)))
    assert output["texts"] == [{"node_id": "41", "class_type": "PreviewAny", "title": "Look", "text": "seen"}]
    assert output["errors"] == ["Something was odd"]
    assert (output["images"], "status" in output) == ([], False)


def test_a_preview_says_that_it_is_one() -> None:
    assert result_as_output(result(artifact("a.png", Kind.IMAGE, type="temp")))["images"][0]["preview"] is True


@given(
    st.lists(st.tuples(st.text(max_size=8), st.sampled_from(Kind), st.none() | st.integers(1, 9)), max_size=5),
    st.lists(st.text(max_size=8), max_size=3),
)
def test_every_output_is_json_with_each_artifact_in_one_list(made: list[Any], warnings: list[str]) -> None:
    artifacts = [artifact(name, kind, width=size, height=size) for name, kind, size in made]
    output = json.loads(json.dumps(result_as_output(result(*artifacts, warnings=tuple(warnings)))))
    listed = {kind: [item["filename"] for item in output.get(kind.value, [])] for kind in Kind}
    assert listed == {kind: [name for name, its_kind, _size in made if its_kind is kind] for kind in Kind}
    assert output.get("errors", []) == warnings
    assert ("status" in output) is (not made)


@pytest.mark.parametrize("workflow", [3, 1.5, True, [1], ["x"], {"nodes": []}, "not json", None])
def test_an_invalid_job_has_an_empty_graph(workflow: object) -> None:
    assert workflow_of({"id": "1", "input": {"workflow": workflow}}) == {}


def test_many_unknown_keys_are_counted() -> None:
    job = parse_job({"input": {"workflow": WORKFLOW, **{f"key_{number}" + "a1" * 1000: 1 for number in range(2000)}}})
    assert len(job.warnings) == 51
    assert job.warnings[-1] == "input has 1950 more keys that are unknown and were ignored"


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_extra_data_has_a_limit(is_wrapped: bool) -> None:
    """Each of its secrets is looked for in each sentence that leaves the worker."""
    extra = {f"key_{number}": "x" for number in range(101)}
    fields = {"workflow": {"prompt": WORKFLOW, "extra_data": extra}} if is_wrapped else {"extra_data": extra}
    assert refused(**fields) == "extra_data has 101 keys; the limit is 100"


# ------------------------------------------------------------------------------------- failures and webhooks


def test_a_failure_as_output() -> None:
    error = InvalidInput("It is wrong", hint="Mend it")
    output = {"error": "It is wrong", "code": "invalid_input", "hint": "Mend it"}
    assert failure_as_output(error) == output
    assert split_failure(output) == (None, output)
    secret = InvalidInput("It is hunter22")
    assert "hunter22" not in json.dumps(failure_as_output(secret, ["hunter22"]))


def test_a_failure_with_partial_outputs() -> None:
    error = InvalidInput("It is wrong")
    error.partial = result(warnings=("Something was odd",))
    output = failure_as_output(error)
    partial = {"images": [], "errors": ["Something was odd"], "prompt_id": "prompt-1", "timings": TIMINGS}
    assert output == {"error": "It is wrong", "code": "invalid_input", **partial, "partial": True}
    assert split_failure(output) == (
        {**partial, "partial": True},
        {"error": "It is wrong", "code": "invalid_input"},
    )


def test_all_fields_of_an_error_are_split_from_the_outputs() -> None:
    error = {"error": "a", "code": "b", "hint": "c", "details": {"d": 1}}
    assert split_failure({**error, "images": [], "partial": True}) == ({"images": [], "partial": True}, error)
    assert split_failure({**error, "partial": "yes"}) == (None, {**error, "partial": "yes"})


def test_warnings_of_an_input_that_is_not_run() -> None:
    warning = "input.strct is unknown and was ignored; did you mean 'strict'?"
    assert input_warnings({"workflow": WORKFLOW, "strct": True, "images": None}) == [warning]
    assert input_warnings({"workflow": WORKFLOW}) == []
    assert input_warnings({"workflow": 7, "strct": True}) == []
    assert input_warnings({"workflow": WORKFLOW, "delivery": {"prefix": "../up"}, "strct": True}) == []


def test_unknown_keys_are_named_as_the_caller_names_the_input() -> None:
    given_input = {"workflow": 7, "strct": True, "comfy_org_api_key": "a", "api_key_comfy_org": "b"}
    assert unknown_keys(given_input, "params") == [
        "params.api_key_comfy_org was ignored because params.comfy_org_api_key is set",
        "params.strct is unknown and was ignored; did you mean 'strict'?",
    ]
    assert unknown_keys({"strct": True})[0].startswith("input.strct ")


@pytest.mark.parametrize("name", ["delivery", "convert", "s3", "webhook"])
def test_unknown_keys_of_an_object_are_named_with_its_path(name: str) -> None:
    valid = {
        "delivery": {},
        "convert": {},
        "s3": {"endpoint_url": "https://s3.example", "access_key_id": "a", "secret_access_key": "b"},
        "webhook": {"url": "https://hooks.example"},
    }
    warning = f"input.{name}.qqq is unknown and was ignored"
    assert parse(**{name: {**valid[name], "qqq": 1}}).warnings == (warning,)


def test_at_most_a_hundred_warnings_are_given() -> None:
    files = [{"name": f"{number}.png", "image": "YQ==", "qqq": 1} for number in range(101)]
    assert len(parse(images=files).warnings) == 100
    assert len(input_warnings({"workflow": WORKFLOW, "images": files})) == 100
    assert parse(images=files).warnings[99] == "input.images.99.qqq is unknown and was ignored"


@pytest.mark.parametrize("field", ["images", "files"])
def test_the_number_of_files_is_limited(field: str) -> None:
    job = {"input": {"workflow": WORKFLOW, field: [{"name": f"{number}.png", "image": "YQ=="} for number in range(3)]}}
    assert len(parse_job(job, max_files=3).files) == 3
    with pytest.raises(InvalidInput, match="3 input files, and this worker takes 2 at most"):
        parse_job(job, max_files=2)


def test_a_missing_workflow_has_a_hint() -> None:
    def hint(**fields: Any) -> str | None:
        with pytest.raises(InvalidInput) as refusal:
            parse_job({"input": fields})
        return refusal.value.hint

    assert hint() == "Send the workflow as input.workflow, or name one of the catalog as input.template"
    modifiers = "Modifiers are for POST /generate of the gateway; send input.workflow or input.template here"
    assert hint(modifier="Text2Image") == modifiers


def test_a_platforms_bucket_is_used_unless_the_input_has_one() -> None:
    platform = {"endpointUrl": "https://a.example", "bucketName": "b", "accessId": "c", "accessSecret": "d"}
    job = {"input": {"workflow": WORKFLOW}, "s3Config": platform}
    bucket = parse_job(job).bucket
    assert bucket is not None
    assert (bucket.endpoint_url, bucket.name, bucket.access_key_id) == ("https://a.example", "b", "c")
    own = {"endpoint_url": "https://own.example", "access_key_id": "a", "secret_access_key": "b"}
    own_bucket = parse_job({"input": {"workflow": WORKFLOW, "s3": own}, "s3Config": platform}).bucket
    assert own_bucket is not None
    assert own_bucket.endpoint_url == "https://own.example"
    with pytest.raises(InvalidInput, match=r"^s3Config\.\w+ is missing"):
        parse_job({"input": {"workflow": WORKFLOW}, "s3Config": {"bucketName": "b"}})


def test_the_webhook_of_an_invalid_job() -> None:
    hook = {"url": "https://hooks.example/a", "extra_params": {"n": 1}}
    webhook = webhook_of({"input": {"workflow": 7, "webhook": hook}})
    assert webhook is not None
    assert (webhook.url, webhook.extra_params) == ("https://hooks.example/a", {"n": 1})
    assert webhook_of({"input": {"workflow": WORKFLOW}}) is None
    assert webhook_of({"input": "{"}) is None
    assert webhook_of({}) is None
    with pytest.raises(InvalidInput, match=r"^input\.webhook\.url is missing"):
        webhook_of({"input": {"webhook": {}}})


def test_the_size_of_extra_params_is_limited() -> None:
    def hook(length: int) -> dict[str, Any]:
        return {"url": "https://hooks.example", "extra_params": {"a": "é" * (length // 2)}}

    around = len('{"a":""}')
    assert parse(webhook=hook(64_000 - around)).webhook is not None
    with pytest.raises(InvalidInput) as refusal:
        parse(webhook=hook(64_002 - around))
    assert refusal.value.message == "input.webhook.extra_params has more than 64 kB as JSON"
    assert refusal.value.hint == "Send a key instead, by which the receiver finds the rest"


def test_many_problems_are_counted() -> None:
    images = [{"image": "YQ=="} for _ in range(23)]
    sentence = refused(images=images)
    assert sentence.startswith(f"{UPLOAD_FAILED}: input.images.0.name is missing; input.images.1.name is missing; ")
    assert sentence.endswith("; input.images.19.name is missing; and 3 more")
    assert refused(images=images[:20]).endswith("input.images.19.name is missing")
    mixed = refused(images=images[:1], strict="yes")
    assert mixed == "input.images.0.name is missing; input.strict must be true or false"


def test_extra_data_beside_a_wrapped_prompt_is_used() -> None:
    wrapped = {"prompt": WORKFLOW, "extra_data": {"a": 1, "b": 2}}
    assert parse(workflow=wrapped, extra_data={"b": 3}).extra_data == {"a": 1, "b": 3}
    assert parse(workflow={"prompt": WORKFLOW, "extra_data": [1]}).extra_data == {}
    extra = {f"key_{number}": "x" for number in range(100)}
    assert len(parse(extra_data=extra).extra_data) == 100


def test_an_artifacts_optional_fields() -> None:
    described = result_as_output(result(artifact("a.mp4", Kind.VIDEO, width=64)))["videos"][0]
    assert not {"width", "height", "duration_s", "url"} & described.keys()


def test_a_warning_of_the_envelope_comes_first() -> None:
    job = {"input": {"input": {"workflow": WORKFLOW, "qqq": 1}}}
    assert parse_job(job).warnings == (
        "input.input was taken for input: the request wraps its input twice",
        "input.qqq is unknown and was ignored",
    )
