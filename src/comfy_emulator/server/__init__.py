"""ComfyUI's HTTP API on aiohttp (`server.py` of ComfyUI)."""
