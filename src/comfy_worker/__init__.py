"""A serverless worker that turns a ComfyUI workflow into an API."""

__version__ = "0.3.0"
