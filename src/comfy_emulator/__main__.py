"""`python -m comfy_emulator`: a ComfyUI without models, editor and GPU on a local port."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from comfy_emulator.emulator import Emulator, EmulatorConfig
from comfy_emulator.faults import Faults
from comfy_emulator.model_files import DEFAULT_MODELS, MODEL_FOLDERS, Models
from comfy_emulator.server.http_server import HttpServer

_MEGABYTE = 1024 * 1024


def main(arguments: Sequence[str] | None = None, program: str = "python -m comfy_emulator") -> None:
    """Serve until SIGTERM or SIGINT; the help shows `program` as the name of the command."""
    options = _parse(arguments, program)
    logging.basicConfig(level=options.log_level.upper(), format="%(levelname)s %(message)s")
    with ExitStack() as stack:
        temporary = None
        if options.base_directory is None:
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="comfyui-emulator-")))
        config = EmulatorConfig(
            base_directory=temporary or options.base_directory,
            models=_models(options.model, with_defaults=not options.no_models),
            max_upload_bytes=round(options.max_upload_size * _MEGABYTE),
            allow_faults=options.allow_faults,
            argv=("main.py", "--cpu", "--listen", options.listen),
        )
        try:
            asyncio.run(_serve(config, options.listen, options.port, temporary))
        except OSError as error:
            sys.exit(f"The emulator cannot listen on {options.listen}:{options.port}: {error}")


def _parse(arguments: Sequence[str] | None, program: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program, description="A ComfyUI without models, editor and GPU on a local port."
    )
    parser.add_argument("--listen", default="127.0.0.1", metavar="IP", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8188, help="port to listen on, 0 for any free port (8188)")
    parser.add_argument(
        "--base-directory",
        type=Path,
        metavar="DIR",
        help="folder with input/, output/, temp/ and models/ (a temporary one)",
    )
    parser.add_argument("--no-models", action="store_true", help="pretend to have no model files")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="FOLDER/FILE",
        help="pretend to have this model too, such as checkpoints/my.safetensors; may be repeated",
    )
    parser.add_argument(
        "--max-upload-size", type=float, default=100, metavar="MB", help="maximum size of a request (100)"
    )
    parser.add_argument("--allow-faults", action="store_true", help="enable POST /_emulator/faults")
    parser.add_argument("--log-level", default="warning", choices=("debug", "info", "warning", "error"))
    options = parser.parse_args(arguments)
    for model in options.model:
        folder, _, name = model.partition("/")
        if folder not in MODEL_FOLDERS or not name:
            parser.error(f"--model {model}: give FOLDER/FILE with one of the folders {', '.join(MODEL_FOLDERS)}")
    return options


def _models(added: Sequence[str], *, with_defaults: bool) -> Models:
    models = {folder: list(names) for folder, names in DEFAULT_MODELS.items()} if with_defaults else {}
    for folder, _, name in (model.partition("/") for model in added):
        models.setdefault(folder, []).append(name)
    return models


async def _serve(config: EmulatorConfig, host: str, port: int, temporary: Path | None) -> None:
    def die() -> None:
        """End like a crash, but remove the temporary folder."""
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        os._exit(1)

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = HttpServer(Emulator(config, Faults(), die), host, port)
    await server.start()
    shown_host = f"[{host}]" if ":" in host else host
    sys.stdout.write(
        f"ComfyUI emulator at http://{shown_host}:{server.port}, files in {config.base_directory.resolve()}\n"
    )
    sys.stdout.flush()
    await stop.wait()
    await server.stop()


if __name__ == "__main__":
    main()
