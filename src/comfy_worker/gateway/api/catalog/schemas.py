"""The shapes of what the catalog API answers, as its OpenAPI declares them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from comfy_worker.gateway.api.schemas import CatalogErrorResponse


class Success(BaseModel):
    """The envelope of what worked."""

    status: Literal["success"] = "success"


class ParameterShown(BaseModel):
    """What a request may say."""

    name: str
    type: str
    description: str
    required: bool
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    choices: list[str] | None = None


class WorkflowNode(BaseModel):
    """A node of a workflow; `{name}` stands for the parameter that sets an input."""

    id: str
    type: str
    inputs: dict[str, Any]


class WorkflowShown(BaseModel):
    """A workflow that can be executed."""

    id: int
    key: str = Field(description="Its name in requests; an `id` does as well.")
    name: str
    description: str
    version: str = Field(description="Made out of its content: another one whenever that changes.")
    parameters: list[ParameterShown]
    nodes: list[WorkflowNode]
    created_at: str
    updated_at: str


class WorkflowList(BaseModel):
    """All workflows."""

    workflows: list[WorkflowShown]


class Workflows(Success):
    """All workflows, in the envelope."""

    data: WorkflowList


class WorkflowData(BaseModel):
    """One workflow."""

    workflow: WorkflowShown


class OneWorkflow(Success):
    """One workflow, in the envelope."""

    data: WorkflowData


class OutputShown(BaseModel):
    """A file that an execution made."""

    url: str = Field(description="Works without a key, for a while; below the gateway's own address.")
    width: int | None = None
    height: int | None = None
    filename: str | None = None
    mime_type: str | None = None
    size_bytes: int | None = None
    duration_s: float | None = None


class Outputs(BaseModel):
    """What an execution made."""

    images: list[OutputShown]
    videos: list[OutputShown] | None = None
    audio: list[OutputShown] | None = None
    files: list[OutputShown] | None = None
    texts: list[str] | None = None
    warnings: list[str] | None = None


class ExecutionShown(BaseModel):
    """Where an execution stands."""

    id: int | str
    workflow_id: int | None = Field(None, description="None for a job that came through another API.")
    status: Literal["pending", "running", "completed", "failed", "cancelled"]
    progress: int = Field(ge=0, le=100, description="How much of the workflow has run.")
    queue_position: int | None = Field(None, description="Position in the queue while it waits; 1 is next.")
    notice: str | None = Field(None, description="Why the job does not advance.")
    outputs: Outputs | None = None
    created_at: str
    updated_at: str


class ExecutionData(BaseModel):
    """One execution."""

    execution: ExecutionShown


class Execution(Success):
    """One execution, in the envelope."""

    data: ExecutionData
    warnings: list[str] | None = Field(None, description="What was ignored in the request.")


class FailedExecution(CatalogErrorResponse):
    """One execution that failed, in the envelope that says why."""

    data: ExecutionData


AnyExecution = Execution | FailedExecution


class NodeInput(BaseModel):
    """What a node takes."""

    name: str
    type: str
    required: bool
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    choices: list[Any] | None = None


class NodeOutput(BaseModel):
    """What a node makes."""

    name: str
    type: str


class NodeShown(BaseModel):
    """A node that ComfyUI has."""

    id: str
    name: str
    description: str
    category: str
    inputs: list[NodeInput]
    outputs: list[NodeOutput]


class NodeList(BaseModel):
    """All nodes."""

    nodes: list[NodeShown]


class Nodes(Success):
    """All nodes, in the envelope."""

    data: NodeList
