"""A small ComfyUI for machines without one: its HTTP API, its events, and the nodes that need no model.

It imports nothing of `comfy_worker`, so that a mistake in one cannot hide a mistake in the other. Faults that a real
ComfyUI shows rarely can be switched on (`Faults`).
"""

from comfy_emulator.emulator_server import EmulatorServer
from comfy_emulator.faults import Faults

__all__ = ["EmulatorServer", "Faults"]
