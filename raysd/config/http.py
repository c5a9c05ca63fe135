"""What a service lets in over HTTP, and how much of it."""

from typing import Annotated

from pydantic import Field, PositiveInt

from raysd.config.base import Spec

MIB = 2**20


class HttpSpec(Spec):
    """The HTTP side of a service. Limits of one key alone are the key's own."""

    public_url: Annotated[str, Field(pattern=r"^https?://[^\s?#]+[^\s?#/]$")] | None = None
    """What links in answers begin with; null: what the request was addressed to."""
    origins: tuple[Annotated[str, Field(pattern=r"^https?://[^\s/?#*]+$")], ...] = ()
    """Web pages of other hosts that may call from a browser (CORS), as https://host[:port]."""
    webhooks: bool = True
    """Whether predictions may name an address to be told."""
    withhold: bool = False
    """Keep no prompt once its pictures are drawn, whatever the request says."""
    most_steps: PositiveInt = 200
    """Denoising steps of a request."""
    most_pixels: PositiveInt = 2048 * 2048
    """Of a picture: width times height."""
    most_pictures: PositiveInt = 10
    """Of a request."""
    json_bytes: PositiveInt = 256 * 1024
    """Largest body without pictures in it."""
    upload_bytes: PositiveInt = 16 * MIB
    """Largest body with pictures in it."""
    body_seconds: Annotated[float, Field(gt=0)] = 60.0
    """For which a body may take to arrive."""
    wait_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longest that a request of the Images API is drawn, and waits; then 504 says so."""
    life_seconds: Annotated[float, Field(ge=5, le=86400)] = 3600.0
    """After which a prediction or comparison that has not ended is given up, if its request says nothing (Cancel-After)."""
    link_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """For which a picture's link holds."""
