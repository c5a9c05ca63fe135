"""What is sent to POST /v1/feedback, and the answer."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from raysd.config.base import Spec
from raysd.database import storable
from raysd.feedback.tables import Choice

GenerationId = Annotated[str, Field(pattern=r"^[a-z2-7]{26}-[0-9]{1,3}$")]
Tag = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9 _-]{0,31}$")]
SAYS = ("thumb", "stars", "tags", "text", "report")


def _storable(text: str) -> str:
    if not storable(text):
        raise ValueError("holds a NUL or half a character; leave it out")
    return text


Text = Annotated[str, AfterValidator(_storable)]
"""That can be encoded and stored."""


class Pair(Spec, strict=True):
    """A choice between two pictures, and on which side each was shown."""

    left: GenerationId
    """The generation on the left."""
    right: GenerationId
    """The generation on the right."""
    choice: Choice
    """The better one."""

    @model_validator(mode="after")
    def _two(self) -> "Pair":
        if self.left == self.right:
            raise ValueError("left and right are the same generation")
        return self


class Feedback(Spec, strict=True):
    """What one user says: of a generation one or more things, or a choice between two."""

    generation: GenerationId | None = None
    """<prediction id>-<number>."""
    thumb: Literal["up", "down"] | None = None
    """Whether it is good."""
    stars: int | None = Field(None, ge=1, le=5)
    """How good it is."""
    tags: list[Tag] | None = Field(None, min_length=1, max_length=10)
    """What is wrong or right with it: a-z, 0-9, space, _ and -."""
    text: Text | None = Field(None, min_length=1, max_length=2000)
    """Anything."""
    report: Text | None = Field(None, min_length=1, max_length=1000)
    """Why nobody should see it."""
    pair: Pair | None = None
    """A choice, alone."""

    @model_validator(mode="after")
    def _one_subject(self) -> "Feedback":
        says = [name for name in SAYS if getattr(self, name) is not None]
        if (self.generation is None) == (self.pair is None):
            raise ValueError("give either generation or pair")
        if self.generation is not None and not says:
            raise ValueError(f"generation: say something of it: {', '.join(SAYS)}")
        if self.pair is not None and says:
            raise ValueError(f"{says[0]}: belongs to a generation, not to a pair")
        return self


class Answer(Spec):
    """That it was kept. Of a pair, which versions drew it."""

    id: str
    left: str | None = None
    right: str | None = None
