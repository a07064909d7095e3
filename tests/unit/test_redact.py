"""No local path and no secret in what leaves the worker; URLs stay as they are."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from comfy_worker.errors import InternalError
from comfy_worker.logs import where_it_broke
from comfy_worker.redact import MASK, redact


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("No such file: '/comfyui/models/vae/a.safetensors'", "No such file: 'a.safetensors'"),
        ("/root/x.py", "x.py"),
        ("/root/folder/", ""),
        ("~/.cache/key", "key"),
        ("(/a/b/c.py, line 7)", "(c.py, line 7)"),
        ("path=/a/b/c", "path=c"),
        ("not found:/a/b/c", "not found:c"),
        ("/a/b:/c/d", "b:d"),
        ("/comfyui//models///a.ckpt", "a.ckpt"),
        ('File "/comfyui/execution.py", line 518', 'File "execution.py", line 518'),
        ("/daten/größe/日本.png", "日本.png"),
        (r"C:\Users\me\a.png", "a.png"),
        (r"'C:\\Users\\me\\a.png'", "'a.png'"),
        (r"C:\Users/me/a.png", "a.png"),
        ("D:\\a.png", "a.png"),
        ("file:///home/me/a.png", "a.png"),
        ("see FILE://server/share/a.png now", "see a.png now"),
        ("two: /a/b/c and /d/e/f", "two: c and f"),
    ],
)
def test_a_local_path_is_cut_to_its_last_part(text: str, left: str) -> None:
    assert redact(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "",
        "models/vae/a.safetensors",
        "../a/b.png",
        "image/png",
        "1/2 and 3/4",
        "and/or",
        "/",
        "/health",
        "50%/50%",
        "Node 30 (ckpt_name): 'sdxl/base.safetensors' not in available models",
        "https://bucket.s3.amazonaws.com/job/a.png?X-Amz-Date=2026&path=/a/b/c#/d/e",
        "http://127.0.0.1:8188/view?filename=/a/b",
        "'https://host/a,/b/c'",
        "s3://bucket/a/b.png",
        "redis://host:6379/0/1",
        "ComfyUI server (127.0.0.1:8188) not reachable after multiple retries",
    ],
)
def test_other_texts_are_left_alone(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "secrets", "left"),
    [
        ("the key is s3cr3t!", ["s3cr3t"], "the key is ***!"),
        ("s3cr3t s3cr3t", ["s3cr3t"], "*** ***"),
        ("wJalr/XUtn/bPx", ["wJalr/XUtn/bPx"], "***"),
        ("https://host/a?key=s3cr3t", ["s3cr3t"], "https://host/a?key=***"),
        ("/home/s3cr3t/a.png", ["s3cr3t"], "a.png"),
        # The shorter one first must not leave the end of the longer one.
        ("abcdefgh", ["abcd", "abcdefgh"], "***"),
        ("a cab abc", ["a", "abc", "", None], "a cab abc"),
    ],
)
def test_secrets_are_masked(text: str, secrets: list[str | None], left: str) -> None:
    assert redact(text, secrets) == left


PIECES = st.sampled_from(
    [
        "/",
        "//",
        "\\",
        ":",
        "C:\\",
        "~",
        "http://",
        "file://",
        "file",
        "host",
        "models",
        "a.png",
        "'",
        '"',
        " ",
        ",",
        "(",
        ")",
        "=",
        "-",
        ".",
        "..",
        "%",
        "*",
        "***",
        "s3cr3t",
        "s3cr3tkey",
        "ü",
    ]
)
TEXTS = st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=40)
SECRETS = st.lists(
    st.sampled_from(["s3cr3t", "s3cr3tkey", "/key/", "host", "****"]) | st.text(min_size=4, max_size=9), max_size=4
)


@given(TEXTS, SECRETS)
@example("/a/C:\\x\\y", [])
@example("s3crs3cr3t3t", ["s3cr3t"])
def test_no_secret_survives_and_redaction_is_idempotent(text: str, secrets: list[str]) -> None:
    once = redact(text, secrets)
    assert not [secret for secret in secrets if secret in once]
    assert redact(once, secrets) == once
    assert len(once) <= len(text)


PARTS = st.text("abcXYZ019_.-äé日", min_size=1, max_size=8)


@given(
    st.sampled_from(["", "in ", "'", '"', "(", "x=", "at: "]),
    st.sampled_from([("/", "/"), ("C:\\", "\\"), ("z:\\\\", "\\\\"), ("file:///", "/"), ("~/", "/")]),
    st.lists(PARTS, min_size=2, max_size=6),
)
def test_no_folder_of_a_path_survives(before: str, style: tuple[str, str], parts: list[str]) -> None:
    root, separator = style
    assert redact(f"{before}{root}{separator.join(parts)}") == f"{before}{parts[-1]}"


@given(
    st.sampled_from(["http", "https", "s3", "redis", "ftp"]),
    st.text("abcXYZ019.-:", min_size=1, max_size=12),
    st.text("abcXYZ019_.-/~%=&?#+,;@()[]:", max_size=30),
)
def test_urls_are_left_alone(scheme: str, host: str, path: str) -> None:
    text = f"see {scheme}://{host}/{path} there"
    assert redact(text) == text


def test_masking_needs_no_secret() -> None:
    assert redact(MASK, [MASK]) == MASK


def test_errors_go_out_without_paths_and_secrets_at_every_depth() -> None:
    error = InternalError(
        "Cannot open /root/x/a.png with s3cr3t",
        hint="Look into /root/x/log",
        details={"given": ["/root/x/a.png", {"key": "s3cr3t"}], "count": 3, "ratio": 0.5, "none": None, "flag": True},
    )
    assert error.as_output(["s3cr3t", None]) == {
        "error": "Cannot open a.png with ***",
        "code": "internal",
        "hint": "Look into log",
        "details": {"given": ["a.png", {"key": "***"}], "count": 3, "ratio": 0.5, "none": None, "flag": True},
    }


def test_where_it_broke_names_modules_instead_of_paths() -> None:
    try:
        redact(None)  # type: ignore[arg-type]
    except TypeError as error:
        where = where_it_broke(error)
    assert where.startswith("TypeError: ")
    assert "test_redact:" in where
    assert " > redact:" in where
    assert redact(where) == where


@pytest.mark.parametrize(
    "part", ["a1", "/a/b ", "a:\\\\", "//", "!/a", "file://", "~/", "a://", "/a/'", "c:\\a\\ ", "':/a/b"]
)
def test_a_long_text_is_redacted_in_time(part: str) -> None:
    """Half a megabyte: what takes a time that grows with the square of the length would not come to an end here."""
    assert len(redact(part * (500_000 // len(part)))) <= 500_000
