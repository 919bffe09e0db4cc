"""The base of all parts of the spec, and the forms of text that several parts share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from opd_core import uris
from opd_core.api import sentences

ShortText = Annotated[str, Field(max_length=253)]
LongText = Annotated[str, Field(max_length=4096)]
LabelKey = Annotated[str, Field(max_length=253, pattern=sentences.LABEL_KEY_PATTERN)]
LabelValue = Annotated[str, Field(max_length=63, pattern=sentences.LABEL_VALUE_PATTERN)]
# A name in the object's own namespace: nothing in a spec can name another one.
LocalName = Annotated[str, Field(max_length=253, pattern=sentences.LOCAL_NAME_PATTERN)]
Uri = Annotated[str, Field(max_length=uris.MAX_LENGTH, pattern=uris.PATTERN)]
OptionalUri = Annotated[str, Field(max_length=uris.MAX_LENGTH, pattern=sentences.OPTIONAL_URI_PATTERN)]
# Of what other packages may bring: rewards, objectives.
PluginName = Annotated[str, Field(min_length=1, max_length=128, pattern=sentences.PLUGIN_PATTERN)]
Guidance = Annotated[float, Field(ge=0, le=50)]


class Model(BaseModel):
    """Base of all parts: camelCase outside, snake_case inside, nothing unknown."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, allow_inf_nan=False, strict=True
    )
