"""What starting the emulator does not load."""

from __future__ import annotations

import subprocess
import sys


def test_starting_loads_no_codecs() -> None:
    code = "import sys, comfy_emulator.nodes; sys.exit('av' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
