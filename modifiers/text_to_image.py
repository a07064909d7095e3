"""A picture from a text: an example of a modifier."""

from comfy_worker.modifiers import BaseModifier


class TextToImage(BaseModifier):
    """Needs a `prompt`; what else is not given stays as it is in the workflow's file, and the seed is a random one."""

    WORKFLOW_JSON = "workflows/text-to-image-sd15.json"
    PROMPT: str | None = None

    async def apply_modifications(self) -> None:
        """Put the values into the nodes of the workflow."""
        checkpoint, prompt, negative, size, sampler = (self.workflow[node]["inputs"] for node in "12345")
        prompt["text"] = await self.modify_workflow_value("prompt", self.PROMPT)
        negative["text"] = await self.modify_workflow_value("negative_prompt", negative["text"])
        checkpoint["ckpt_name"] = await self.modify_workflow_value("ckpt_name", checkpoint["ckpt_name"])
        for name in ("width", "height", "batch_size"):
            size[name] = await self.modify_workflow_value(name, size[name])
        for name in ("steps", "sampler_name", "scheduler", "denoise"):
            sampler[name] = await self.modify_workflow_value(name, sampler[name])
        cfg_scale = await self.modify_workflow_value("cfg_scale", sampler["cfg"])
        sampler["cfg"] = await self.modify_workflow_value("cfg", cfg_scale)
        sampler["seed"] = await self.modify_workflow_value("seed", "__RANDOM_INT__")
        await super().apply_modifications()


class Text2Image(TextToImage):
    """The same by the name that AI-Dock's wrapper gives it, where no value is required."""

    PROMPT = ""
