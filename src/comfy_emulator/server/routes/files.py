"""`/upload/image`, `/upload/mask` and `/view` (`server.py` of ComfyUI)."""

from __future__ import annotations

import io
import json
import mimetypes
import os.path
from pathlib import Path
from typing import Any

from aiohttp import web
from PIL import Image, PngImagePlugin

from comfy_emulator.folder_paths import FolderPaths
from comfy_emulator.server.request import emulator_of

_INTERNAL_ERROR = "500 Internal Server Error\n\nServer got itself in trouble"
_DOWNLOADED_TYPES = {"text/html", "text/html-sandboxed", "application/xhtml+xml", "text/javascript", "text/css"}
"""Types that a browser would execute; they are served as `application/octet-stream`."""


def add_routes(router: web.UrlDispatcher, prefix: str) -> None:
    """Add the routes of this module below `prefix`."""
    router.add_post(f"{prefix}/upload/image", upload_image)
    router.add_post(f"{prefix}/upload/mask", upload_mask)
    router.add_get(f"{prefix}/view", view_image)


class _Refused(Exception):
    """Ends a request with a status and an empty body."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


async def upload_image(request: web.Request) -> web.Response:
    """Store a file of any type in `input/` or another folder."""
    post = await request.post()
    return _upload(emulator_of(request).folders, dict(post), mask=False)


async def upload_mask(request: web.Request) -> web.Response:
    """Store a copy of an existing image with the alpha channel of the upload."""
    post = await request.post()
    return _upload(emulator_of(request).folders, dict(post), mask=True)


def _upload(folders: FolderPaths, post: dict[str, Any], *, mask: bool) -> web.Response:
    try:
        image = _uploaded_file(post)
        folder_type = post.get("type", "input")
        root = folders.by_type(folder_type)
        if root is None:
            raise web.HTTPInternalServerError(text=_INTERNAL_ERROR)
        subfolder = post.get("subfolder", "")
        folder = root / os.path.normpath(subfolder)
        _refuse_outside(root, folder / image.filename, status=400)
        folder.mkdir(parents=True, exist_ok=True)
        content = image.file.read()
        overwrite = post.get("overwrite") in ("true", "1")
        name, is_same = (image.filename, False) if overwrite else _free_name(folder, image.filename, content)
        if mask:
            _write_masked(folders, json.loads(post["original_ref"]), content, folder / name)
        elif not is_same:
            (folder / name).write_bytes(content)
    except _Refused as refused:
        return web.Response(status=refused.status)
    return web.json_response({"name": name, "subfolder": subfolder, "type": folder_type})


def _uploaded_file(post: dict[str, Any]) -> web.FileField:
    """Return the `image` field; one with content but without a file name is a 500, as in ComfyUI."""
    image = post.get("image")
    if not image:
        raise _Refused(400)
    if not isinstance(image, web.FileField):
        raise web.HTTPInternalServerError(text=_INTERNAL_ERROR)
    return image


def _refuse_outside(root: Path, path: Path, *, status: int) -> None:
    if not Path(os.path.abspath(path)).is_relative_to(root):  # noqa: PTH100 - `resolve` follows links, ComfyUI does not
        raise _Refused(status)


def _free_name(folder: Path, filename: str, content: bytes) -> tuple[str, bool]:
    """Return a name that is free, or whose file has the same content, and whether it has."""
    stem, extension = os.path.splitext(filename)  # noqa: PTH122 - differs from `Path.suffix` for names like `a.`
    name, number = filename, 1
    while (folder / name).exists():
        if (folder / name).read_bytes() == content:
            return name, True
        name = f"{stem} ({number}){extension}"
        number += 1
    return name, False


def _write_masked(folders: FolderPaths, original: dict[str, str], content: bytes, target: Path) -> None:
    """Save the original with the alpha channel of the upload; do nothing if there is no original."""
    source = _view_path(folders, original)
    if not source.is_file():
        return
    with Image.open(source) as picture, Image.open(io.BytesIO(content)) as mask:
        metadata = PngImagePlugin.PngInfo()
        for key, value in getattr(picture, "text", {}).items():
            metadata.add_text(key, value)
        masked = picture.convert("RGBA")
        masked.putalpha(mask.convert("RGBA").getchannel("A"))
        masked.save(target, compress_level=4, pnginfo=metadata)


def _view_path(folders: FolderPaths, query: dict[str, str]) -> Path:
    """Return the file that `filename`, `subfolder` and `type` name."""
    filename, root = folders.split_annotation(query["filename"])
    if not filename or filename.startswith("/") or ".." in filename:
        raise _Refused(400)
    if root is None:
        root = folders.by_type(query.get("type", "output"))
    if root is None:
        raise _Refused(400)
    folder = root / query.get("subfolder", "")
    _refuse_outside(root, folder, status=403)
    return folder / os.path.basename(filename)  # noqa: PTH119 - `Path.name` ignores a trailing slash


async def view_image(request: web.Request) -> web.StreamResponse:
    """Send a file, a range of it, a smaller preview or one of its channels."""
    query = dict(request.query)
    if "filename" not in query:
        return web.Response(status=404)
    try:
        path = _view_path(emulator_of(request).folders, query)
    except _Refused as refused:
        return web.Response(status=refused.status)
    if not path.is_file():
        return web.Response(status=404)
    disposition = {"Content-Disposition": f'filename="{path.name}"'}
    if "preview" in query:
        image_format, content = _preview(path, query["preview"], query.get("channel", ""))
        return web.Response(body=content, content_type=f"image/{image_format}", headers=disposition)
    if query.get("channel") in ("rgb", "a"):
        return web.Response(body=_channel(path, query["channel"]), content_type="image/png", headers=disposition)
    return web.FileResponse(path, headers={**disposition, "Content-Type": _content_type(path)})


def _content_type(path: Path) -> str:
    guessed = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return "application/octet-stream" if guessed in _DOWNLOADED_TYPES else guessed


def _preview(path: Path, preview: str, channel: str) -> tuple[str, bytes]:
    """Encode an image as `preview` says, such as `webp;80` for format and quality."""
    parts = preview.split(";")
    image_format = parts[0] if parts[0] in ("webp", "jpeg") and "a" not in channel else "webp"
    quality = int(parts[-1]) if parts[-1].isdigit() else 90
    with Image.open(path) as picture:
        opaque = picture.convert("RGB") if image_format == "jpeg" or channel == "rgb" else picture
        buffer = io.BytesIO()
        opaque.save(buffer, format=image_format, quality=quality)
    return image_format, buffer.getvalue()


def _channel(path: Path, channel: str) -> bytes:
    """Return only the colours, or only the alpha channel, as a PNG."""
    with Image.open(path) as picture:
        if channel == "rgb":
            shown = picture.convert("RGB")
        else:
            shown = Image.new("RGBA", picture.size)
            shown.putalpha(picture.getchannel("A") if picture.mode == "RGBA" else Image.new("L", picture.size, 255))
        buffer = io.BytesIO()
        shown.save(buffer, format="PNG")
    return buffer.getvalue()
