"""What the catalog API takes and returns."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from comfy_worker.gateway.api.schemas import CatalogErrorResponse, RequestModel, body_examples


class ExecuteRequest(RequestModel):
    """The values to fill a workflow in with."""

    HINT: ClassVar[str] = 'Send {"inputs": {"prompt": "…"}}'
    inputs: dict[str, Any] | None = Field(None, description="Values by the names of the parameters.")
    version: str | None = Field(None, description="The version of the workflow; the current one if not given.")
    webhook: dict[str, Any] | None = Field(
        None, description="The receiver of the job's webhooks; see docs/reference/webhooks.md."
    )


ExecuteBody = Annotated[ExecuteRequest, body_examples({"inputs": {}})]


class Success(BaseModel):
    """The envelope of a successful response."""

    status: Literal["success"] = "success"


class Parameter(BaseModel):
    """A parameter of a workflow."""

    name: str
    type: str
    description: str
    required: bool
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    choices: list[str] | None = None


class WorkflowNode(BaseModel):
    """A node of a workflow; `{name}` as an input stands for the parameter that sets it."""

    id: str
    type: str
    inputs: dict[str, Any]


class Workflow(BaseModel):
    """A workflow that can be executed."""

    id: int
    key: str = Field(description="Its name in requests, where the `id` can be used too.")
    name: str
    description: str
    version: str = Field(description="A hash of its content.")
    parameters: list[Parameter]
    nodes: list[WorkflowNode]
    created_at: str
    updated_at: str


class WorkflowList(BaseModel):
    """All workflows."""

    workflows: list[Workflow]


class WorkflowsResponse(Success):
    """All workflows, in the envelope."""

    data: WorkflowList


class WorkflowData(BaseModel):
    """One workflow."""

    workflow: Workflow


class WorkflowResponse(Success):
    """One workflow, in the envelope."""

    data: WorkflowData


class OutputFile(BaseModel):
    """A file that an execution made."""

    url: str = Field(description="Works without a key for a while; relative to the gateway's root.")
    width: int | None = None
    height: int | None = None
    filename: str | None = None
    mime_type: str | None = None
    size_bytes: int | None = None
    duration_s: float | None = None


class Outputs(BaseModel):
    """The outputs of an execution."""

    images: list[OutputFile]
    videos: list[OutputFile] | None = None
    audio: list[OutputFile] | None = None
    files: list[OutputFile] | None = None
    texts: list[str] | None = None
    warnings: list[str] | None = None


class Execution(BaseModel):
    """The status of an execution."""

    id: int | str
    workflow_id: int | None = Field(None, description="Null for a job that was submitted through another API.")
    status: Literal["pending", "running", "completed", "failed", "cancelled"]
    progress: int = Field(ge=0, le=100, description="How much of the workflow has run.")
    queue_position: int | None = Field(None, description="Position in the queue while it waits; 1 is next.")
    notice: str | None = Field(None, description="Why the job does not advance.")
    outputs: Outputs | None = None
    created_at: str
    updated_at: str


class ExecutionData(BaseModel):
    """One execution."""

    execution: Execution


class ExecutionResponse(Success):
    """One execution, in the envelope."""

    data: ExecutionData
    warnings: list[str] | None = Field(None, description="What was ignored in the request.")


class FailedExecutionResponse(CatalogErrorResponse):
    """A failed execution, in the envelope of errors."""

    data: ExecutionData


AnyExecutionResponse = ExecutionResponse | FailedExecutionResponse


class NodeInput(BaseModel):
    """An input of a node."""

    name: str
    type: str
    required: bool
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    choices: list[Any] | None = None


class NodeOutput(BaseModel):
    """An output of a node."""

    name: str
    type: str


class Node(BaseModel):
    """A node of ComfyUI."""

    id: str
    name: str
    description: str
    category: str
    inputs: list[NodeInput]
    outputs: list[NodeOutput]


class NodeList(BaseModel):
    """All nodes."""

    nodes: list[Node]


class NodesResponse(Success):
    """All nodes, in the envelope."""

    data: NodeList
