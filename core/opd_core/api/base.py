"""The base of all parts of the spec, and the forms of text that several parts share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from opd_core.api import sentences

ShortText = Annotated[str, Field(max_length=253)]
LongText = Annotated[str, Field(max_length=4096)]
LabelKey = Annotated[str, Field(max_length=253, pattern=sentences.LABEL_KEY_PATTERN)]
LabelValue = Annotated[str, Field(max_length=63, pattern=sentences.LABEL_VALUE_PATTERN)]
# A name in the object's own namespace: nothing in a spec can name another one.
LocalName = Annotated[str, Field(max_length=253, pattern=sentences.LOCAL_NAME_PATTERN)]


class Model(BaseModel):
    """Base of all parts: camelCase outside, snake_case inside, nothing unknown."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, allow_inf_nan=False, strict=True
    )
