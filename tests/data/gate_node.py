"""ComfyUI custom node for tests: a node that is at work until a test lets it go on or fail.

It notes each time that it begins as a line in `<file>.begun`, waits until `file` is there, and fails with what the
file says unless it is empty.
"""
import os
import time

import comfy.model_management


class TestGate:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "file": ("STRING", {"default": ""})}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "wait"
    CATEGORY = "worker-tests"

    def wait(self, image, file):
        with open(f"{file}.begun", "a") as begun:
            begun.write("begun\n")
        while not os.path.exists(file):
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.01)
        with open(file) as said:
            message = said.read()
        if message:
            raise RuntimeError(message)
        return (image,)


NODE_CLASS_MAPPINGS = {"TestGate": TestGate}
NODE_DISPLAY_NAME_MAPPINGS = {"TestGate": "Test Gate"}
