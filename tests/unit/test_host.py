"""Where servers listen."""

import pytest

from raysd.errors import RequestError
from raysd.host import is_loopback, listen


def test_a_port_that_is_taken_is_refused():
    for host in ("127.0.0.1", "localhost"):
        with listen(host, 0) as first, pytest.raises(RequestError, match="cannot listen there"):
            listen(host, first.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.3.2.1", True), ("[::1]", True), ("LOCALHOST", True), ("localhost.evil.org", False), ("", False)],
)
def test_whether_an_address_is_this_machines_alone(host, alone):
    assert is_loopback(host) is alone
