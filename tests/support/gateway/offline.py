"""`python -m tests.support.gateway.offline FILE`: a gateway that can reach nothing but a few names and addresses.

What it looks up and connects to is written into FILE, a line each. `names` and `servers` of the small internet come as
JSON in SMALL_INTERNET.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from comfy_worker.cli.main import main
from tests.support.network.fake_internet import FakeInternet


class _Lines(list[str]):
    """A list whose items are written down the moment they are added."""

    def __init__(self, file: Path, word: str) -> None:
        super().__init__()
        self._file = file
        self._word = word
        self._lock = threading.Lock()

    def append(self, item: str) -> None:
        super().append(item)
        with self._lock, self._file.open("a", encoding="utf-8") as file:
            file.write(f"{self._word} {item}\n")


if __name__ == "__main__":
    record = Path(sys.argv[1])
    given = json.loads(os.environ.pop("SMALL_INTERNET"))
    internet = FakeInternet(given["names"], given["servers"], _Lines(record, "asked"), _Lines(record, "reached"))
    with pytest.MonkeyPatch.context() as patch:
        internet.install(patch)
        sys.exit(main(["serve"]))
