"""A small ComfyUI for machines without one: its API, its events, and the nodes that need no model for real."""

from comfy_emulator.faults import Faults
from comfy_emulator.server import EmulatorServer

__all__ = ["EmulatorServer", "Faults"]
