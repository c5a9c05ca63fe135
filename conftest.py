"""Fixtures for all tests, and threads that two cores can carry."""

from raysd.quiet import quiet_libraries

quiet_libraries()
pytest_plugins = [
    "tests.base",
    "tests.browser",
    "tests.cluster",
    "tests.postgres",
    "tests.records",
    "tests.service",
    "tests.soaks",
]
