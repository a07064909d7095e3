"""All that speaks to ComfyUI."""
