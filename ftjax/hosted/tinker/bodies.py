"""The requests of Tinker's client that are JSON, with what of them counts here; what does not is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Metadata = dict[str, Any] | None
Number = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """All have a `type`, which says nothing that their path does not."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    type: str | None = None


class CreateSession(Body):
    tags: list[str] = []
    user_metadata: Metadata = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: Annotated[str, Field(max_length=512)] | None = None


class Heartbeat(Body):
    session_id: Name


class Lora(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rank: Annotated[int, Field(ge=1, le=512)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class Optimizer(BaseModel):
    """There is one."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["adamw"] = "adamw"


class CreateModel(Body):
    session_id: Name
    model_seq_id: Number
    base_model: Name
    user_metadata: Metadata = None
    lora_config: Lora
    optimizer_config: Optimizer = Optimizer()


class OfModel(Body):
    model_id: Name


class Adam(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(ge=1e-37)] = 1e-12  # which float32 tells from 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip_norm: Annotated[float, Field(ge=0)] = 0.0


class InLine(OfModel):
    """What has a place in the sequence of what is asked of a model."""

    seq_id: Number | None = None


class OptimStep(InLine):
    # Checked when its turn comes: a place in the sequence that is refused would be missing there.
    adam_params: dict[str, Any] | None = None
    optimizer_params: dict[str, Any] | None = None


class SaveWeights(InLine):
    path: str | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


class SaveForSampler(InLine):
    path: str | None = None
    sampling_session_seq_id: Number | None = None
    kind: str = "snapshot"
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None


class LoadWeights(Body):
    model_id: Name | None = None
    seq_id: Number | None = None
    session_id: Name | None = None
    model_seq_id: Number | None = None
    base_model: Name | None = None
    user_metadata: Metadata = None
    path: str
    optimizer: bool
    optimizer_config: Optimizer | None = None
    weights_access_token: str | None = None


class Retrieve(Body):
    request_id: Name
    allow_metadata_only: bool = False


class WeightsInfo(Body):
    tinker_path: Name


class Ttl(Body):
    ttl_seconds: int | None = None


class CreateSamplingSession(Body):
    session_id: Name
    sampling_session_seq_id: Number
    base_model: Name | None = None
    model_path: str | None = None


class Chunk(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["encoded_text"] = "encoded_text"
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class Prompt(BaseModel):
    model_config = ConfigDict(extra="forbid")

    chunks: list[Chunk]


class Params(BaseModel):
    """How a completion is drawn; `stop`: None is the model's own end tokens, [] none at all."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class Sample(Body):
    num_samples: Annotated[int, Field(ge=1, le=1024)] = 1
    prompt: Prompt
    sampling_params: Params
    base_model: Name | None = None
    model_path: str | None = None
    sampling_session_id: Name | None = None
    seq_id: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0)] = 0
    target_prompt_logprobs: Any = None
    prompt_alt_tokens_k: Annotated[int, Field(ge=0)] = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    record_stability_info: bool | None = None
