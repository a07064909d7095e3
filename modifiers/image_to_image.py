"""Repaints an image after a text: an example of a modifier with a file."""

from comfy_worker.modifiers import BaseModifier


class ImageToImage(BaseModifier):
    """Requires `input_image` and `prompt`; other values default to those in the workflow's file."""

    WORKFLOW_JSON = "workflows/image-to-image.json"
    PROMPT: str | None = None

    async def apply_modifications(self) -> None:
        """Set the values in the nodes of the workflow; the worker downloads a URL in `input_image`."""
        picture, size, checkpoint, prompt, negative = (self.workflow[node]["inputs"] for node in "12345")
        sampler = self.workflow["7"]["inputs"]
        picture["image"] = await self.modify_workflow_value("input_image")
        prompt["text"] = await self.modify_workflow_value("prompt", self.PROMPT)
        negative["text"] = await self.modify_workflow_value("negative_prompt", negative["text"])
        checkpoint["ckpt_name"] = await self.modify_workflow_value("ckpt_name", checkpoint["ckpt_name"])
        for name in ("width", "height"):
            size[name] = await self.modify_workflow_value(name, size[name])
        for name in ("steps", "sampler_name", "scheduler", "denoise"):
            sampler[name] = await self.modify_workflow_value(name, sampler[name])
        cfg_scale = await self.modify_workflow_value("cfg_scale", sampler["cfg"])
        sampler["cfg"] = await self.modify_workflow_value("cfg", cfg_scale)
        sampler["seed"] = await self.modify_workflow_value("seed", "__RANDOM_INT__")
        await super().apply_modifications()


class Image2Image(ImageToImage):
    """The same under the name in AI-Dock's wrapper, where the prompt is optional."""

    PROMPT = ""
