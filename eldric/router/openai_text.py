"""What the fields of OpenAI's requests are made of."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


class StrictBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


def unicode(value: str) -> str:
    """JSON can spell halves of surrogate pairs, which are no text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("no_unicode", "valid Unicode: a surrogate stands alone") from None
    return value


Text = Annotated[str, AfterValidator(unicode)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
