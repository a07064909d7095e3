"""A picture painted anew after a text: an example of a modifier that takes a file."""

from comfy_worker.modifiers import BaseModifier


class ImageToImage(BaseModifier):
    """Needs an `input_image` and a `prompt`; what else is not given stays as it is in the workflow's file."""

    WORKFLOW_JSON = "workflows/image-to-image.json"
    PROMPT: str | None = None

    async def apply_modifications(self) -> None:
        """Put the values into the nodes of the workflow; a URL as `input_image` is fetched by the worker."""
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
    """The same by the name that AI-Dock's wrapper gives it, where no prompt is required."""

    PROMPT = ""
