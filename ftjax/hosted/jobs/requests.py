"""What a client may ask for: the bodies of requests, with the bounds of their numbers."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Auto = Literal["auto"]
Count = Auto | Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
Factor = Auto | Annotated[float, Field(gt=0, le=1_000, allow_inf_nan=False)]
# PostgreSQL's texts have no NUL.
Text = Annotated[str, Field(max_length=512, pattern=r"^[^\x00]*$")]


class Asked(BaseModel):
    """A part of a body; keys that there are none of are refused by name."""

    model_config = ConfigDict(extra="forbid")


class Hyperparameters(Asked):
    """Of every method."""

    batch_size: Count | None = "auto"
    learning_rate_multiplier: Factor | None = "auto"
    n_epochs: Count | None = "auto"


class OfPairs(Hyperparameters):
    beta: Factor | None = "auto"


class OfRewards(Hyperparameters):
    compute_multiplier: Factor | None = "auto"
    eval_interval: Count | None = "auto"
    eval_samples: Count | None = "auto"
    reasoning_effort: Literal["default"] | None = "default"  # models here have no such setting


class Supervised(Asked):
    hyperparameters: Hyperparameters | None = None


class Dpo(Asked):
    hyperparameters: OfPairs | None = None


class Reinforcement(Asked):
    grader: dict[str, Any]
    hyperparameters: OfRewards | None = None


class Method(Asked):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None

    @model_validator(mode="after")
    def _only_its_own(self) -> "Method":
        for name in ("supervised", "dpo", "reinforcement"):
            if name != self.type and getattr(self, name) is not None:
                raise ValueError(f"method.{name} is set, and method.type is {self.type!r}; leave one of them out")
        if self.type == "reinforcement" and self.reinforcement is None:
            raise ValueError("method.reinforcement.grader says what is rewarded; give one")
        return self


class NewJob(Asked):
    """The body of a request for a job."""

    model: Text
    training_file: Text
    validation_file: Text | None = None
    suffix: str | None = None
    seed: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: list[Any] | None = None
    metadata: dict[Text, Text] | None = None

    @field_validator("suffix")
    @classmethod
    def _fits_a_name(cls, suffix: str | None) -> str | None:
        if suffix and not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", suffix):
            raise ValueError("a suffix is part of the model's name: letters, digits, '.', '_' and '-', 64 at most")
        return suffix or None

    @field_validator("metadata")
    @classmethod
    def _few_and_short(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        if metadata and (len(metadata) > 16 or max(map(len, metadata)) > 64):
            raise ValueError("metadata may have 16 keys of 64 characters each")
        return metadata

    @model_validator(mode="after")
    def _one_form(self) -> "NewJob":
        if self.method is not None and self.hyperparameters is not None:
            raise ValueError("hyperparameters is the older form of method; give them in method alone")
        return self

    def of_method(self) -> tuple[str, dict[str, Any]]:
        """The method's name and its hyperparameters, those of the older form of a request included."""
        if self.method is None:
            given = self.hyperparameters or Hyperparameters()
            return "supervised", _settled(given)
        own = getattr(self.method, self.method.type)
        if own is not None and own.hyperparameters is not None:
            return self.method.type, _settled(own.hyperparameters)
        kinds = {"supervised": Hyperparameters, "dpo": OfPairs, "reinforcement": OfRewards}
        return self.method.type, _settled(kinds[self.method.type]())


def _settled(given: Hyperparameters) -> dict[str, Any]:
    """With "auto" where there is nothing, as where a client writes null."""
    fallback = {"reasoning_effort": "default"}
    values = given.model_dump()
    return {name: fallback.get(name, "auto") if value is None else value for name, value in values.items()}
