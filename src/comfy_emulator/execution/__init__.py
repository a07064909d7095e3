"""Running prompts: the queue, the order of nodes, the cache and the events (`execution.py`, `comfy_execution/`)."""
