"""The time that a sampling step of the emulator takes."""

from __future__ import annotations

import subprocess
import sys


def test_the_time_of_a_step_comes_from_the_environment() -> None:
    code = "from comfy_emulator.nodes.sampling import STEP_SECONDS; print(STEP_SECONDS)"
    environment = {"COMFY_EMULATOR_STEP_SECONDS": "0.5", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) == 0.5
