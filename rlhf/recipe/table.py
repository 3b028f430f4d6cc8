"""What every table of a recipe is, and the kinds of value that their keys take."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]  # "~" is the user's home
NonEmpty = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
SparseLayers = Literal["all", "every_second", "first_half", "second_half"]  # of a mixture of experts
Slot = Literal["vision", "connector", "packer", "decoder"]  # of a bridge, that has weights
# of vLLM its own or its Transformers backend; or transformers' own forward, for what vLLM cannot serve
Implementation = Literal["auto", "vllm", "transformers", "huggingface"]


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
