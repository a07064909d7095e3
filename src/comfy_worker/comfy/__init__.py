"""Everything that talks to ComfyUI."""
