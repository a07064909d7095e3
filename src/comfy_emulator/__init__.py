"""A small ComfyUI for machines without one: its API, its events, and the nodes that need no model for real."""

from comfy_emulator.emulator_server import EmulatorServer
from comfy_emulator.faults import Faults

__all__ = ["EmulatorServer", "Faults"]
