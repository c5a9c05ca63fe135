"""A service for all tests of a file, as its clients reach it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.serving import Parts


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[tuple[Parts, str]]":
    """What it is made of, and the URL at which it answers."""
    from tests.serving import listening, parts  # torch takes seconds, and most files need neither

    found = parts(tmp_path_factory.mktemp("service"))
    with listening(found) as url:
        yield found, url
