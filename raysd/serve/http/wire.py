"""What all ways of asking for a picture have in common on the wire. Bounds, defaults and meanings are those of `Drawing`."""

import secrets
from collections.abc import Mapping
from copy import copy
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raysd.config.http import HttpSpec
from raysd.errors import RequestError
from raysd.feedback import wire as feedback
from raysd.serve.drawing import Drawing, Sampler
from raysd.serve.http.errors import invalid

INSIDE = {
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "n": "count",
    "num_outputs": "count",
}
"""What a field of the wire is called in `Drawing`; the others have the same name."""


def field_of(name: str, **changes: Any) -> Any:
    """The field of `Drawing`, with what is said of it there; `changes` replace its default or description."""
    field = copy(Drawing.model_fields[name])
    for attribute, value in changes.items():
        setattr(field, attribute, value)
    return field


Text = Annotated[feedback.Text, Field(json_schema_extra={"pattern": r"^[^\x00]*$"})]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/@:-]*$")]
"""Of a model or version."""

Picture = Annotated[str, Field(max_length=64 * 2**20, pattern=r"^(data:|https?://)")]
Size = Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")]
User = Annotated[Text, Field(max_length=512)]


class Wire(BaseModel):
    """A body: an unknown field is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class Asked(Wire):
    """What can be asked of every picture. Null is as good as absent."""

    prompt: Text = field_of("prompt")
    negative_prompt: Text | None = field_of("negative", default=None)
    num_inference_steps: int | None = field_of("steps")
    guidance_scale: float | None = field_of("guidance")
    seed: int | None = field_of(
        "seed",
        default=None,
        description="Of the first picture's noise; each further picture's is one more. By lot if not given.",
    )
    sampler: Sampler | None = field_of("sampler")
    lora: Name | None = None
    """A LoRA version to draw with, as model@number."""


class Addressed(Asked):
    """With the model, the size and the user, as OpenAI's clients name them."""

    model: Name | None = None
    """As GET /v1/models names it, or one of its versions as name@number; may be left out where one model is served."""
    size: Size | None = "auto"
    """Pixels as WIDTHxHEIGHT, multiples of 8; auto: the model's own size, and of an edit the shape of its picture."""
    user: User | None = None
    """Your name for who asks: the same user is drawn for by the same version. Kept as a digest alone."""

    def pixels(self) -> dict[str, int]:
        """The size as fields of `Drawing`."""
        if self.size is None or self.size == "auto":
            return {}
        width, height = self.size.split("x")
        return {"width": int(width), "height": int(height)}


class Input(Asked):
    """What Replicate's clients send as `input`."""

    num_outputs: int | None = field_of("count")
    width: int | None = field_of("width")
    height: int | None = field_of("height")
    image: Picture | None = None
    """A picture to start from, as a data: URI or as a URL that POST /v1/files answered."""
    mask: Picture | None = None
    """Of the size of `image`: its white is drawn anew, its black kept."""
    strength: float | None = field_of("strength")


def drawing(asked: Wire, spec: HttpSpec, **more: Any) -> Drawing:
    """What `asked` describes. `more` are fields of `Drawing` that stand otherwise on the wire. Raises RequestError."""
    names = {INSIDE.get(name, name): name for name in type(asked).model_fields}
    described = set(Drawing.model_fields) - {"image", "mask"}  # which are digests there
    values = {inside: getattr(asked, name) for inside, name in names.items() if inside in described}
    values = {"seed": secrets.randbelow(2**32)} | {n: v for n, v in (values | more).items() if v is not None}
    if "num_inference_steps" not in asked.model_fields_set or "steps" not in values:  # left out, or null
        values["steps"] = min(Drawing.model_fields["steps"].default, spec.most_steps)
    if "width" in more:
        names |= {"width": "size", "height": "size"}
    try:
        made = Drawing.model_validate(values)
    except ValidationError as error:
        raise invalid(error, names) from None
    _check(made, spec, names)
    return made


def _check(made: Drawing, spec: HttpSpec, names: Mapping[str, str]) -> None:
    """What this service allows may be less than what can be drawn."""
    if made.steps > spec.most_steps:
        raise RequestError(f"{names['steps']}: at most {spec.most_steps} here")
    if made.count > spec.most_pictures:
        raise RequestError(f"{names.get('count', 'n')}: at most {spec.most_pictures} here")
    width, height = made.width or made.height or 0, made.height or made.width or 0  # one alone counts as both
    if width * height > spec.most_pixels:
        field = names["width" if made.width else "height"]
        raise RequestError(f"{field}: at most {spec.most_pixels:,} pixels here, width times height")
