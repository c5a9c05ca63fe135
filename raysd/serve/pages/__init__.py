"""The page at /: draw, say what one thinks of it, compare two versions blind. One document, nothing loaded from elsewhere.

`page` is its HTML and `policy` the Content-Security-Policy that it needs, both of one nonce, new for each answer.
All that it knows comes from the service's own addresses under /v1, as any other client's.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from raysd.serve.drawing import LARGEST_SIDE, LONGEST_PROMPT, MOST_STEPS, Drawing, Sampler

HERE = Path(__file__).parent
SCRIPTS = ("service.js", "stage.js", "history.js", "rate.js", "draw.js", "compare.js", "main.js")
"""Parts of one module, in the order in which they need each other."""
SIZES = ("256x256", "512x512", "512x768", "768x512", "768x768", "1024x1024", "832x1216", "1216x832")
SAMPLERS: dict[Sampler, str] = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "unipc": "UniPC",
}
"""Those that every Stable Diffusion 1 model takes; the others need a model that was made for them."""
TAGS = ("hands", "faces", "blurry", "colours", "composition", "not-as-asked")


@dataclass(frozen=True)
class Settings:
    """What differs from service to service."""

    wants_key: bool = False
    """Whether an API key is asked for."""
    most_steps: int = MOST_STEPS
    most_pixels: int = LARGEST_SIDE * LARGEST_SIDE
    """Of a picture: width times height."""


def page(nonce: str, settings: Settings) -> str:
    """The HTML."""
    fields = Drawing.model_fields
    return _template().render(
        nonce=nonce,
        settings=settings,
        style=_source("page.css"),
        script=Markup("\n").join(_source(name) for name in SCRIPTS),
        sizes=[size for size in SIZES if _pixels(size) <= settings.most_pixels],
        samplers=SAMPLERS.items(),
        steps=min(fields["steps"].default, settings.most_steps),
        guidance=fields["guidance"].default,
        longest_prompt=LONGEST_PROMPT,
        tags=TAGS,
    )


def policy(nonce: str) -> str:
    """The header Content-Security-Policy: no other host, no script or style but the page's, and no HTML made of text."""
    return (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' blob: data:; "
        "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'; require-trusted-types-for 'script'"
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((HERE / "index.html.j2").read_text(encoding="utf-8"))


@cache
def _source(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _pixels(size: str) -> int:
    width, height = size.split("x")
    return int(width) * int(height)
