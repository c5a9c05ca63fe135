"""Packages that libraries would import for nothing are left out until they are asked for."""

import gc
import importlib
import importlib.util
import sys

import pytest

from raysd import quiet


@pytest.fixture
def left_out(monkeypatch):
    """`colorsys`, which nobody here needs, in the place of packages that take seconds."""
    threshold = gc.get_threshold()
    monkeypatch.setattr(quiet, "LEFT_OUT", ("colorsys",))
    monkeypatch.setattr(quiet, "LOOKING", ())
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    quiet.import_quickly()
    yield "colorsys"
    sys.modules.pop("colorsys", None)
    gc.set_threshold(*threshold)


def test_a_package_that_is_left_out_is_not_found_until_it_is_brought_in(left_out):
    assert importlib.util.find_spec(left_out) is None
    with pytest.raises(ImportError):
        importlib.import_module(left_out)
    assert quiet.bring_in(left_out).__name__ == left_out
    assert importlib.import_module(left_out) is sys.modules[left_out]
    quiet.import_quickly()
    assert sys.modules[left_out] is not None, "what is loaded stays"


def test_a_package_that_a_library_has_found_already_stays(monkeypatch):
    monkeypatch.setattr(quiet, "LEFT_OUT", ("colorsys",))
    monkeypatch.setattr(quiet, "LOOKING", ("json",))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    threshold = gc.get_threshold()
    quiet.import_quickly()
    gc.set_threshold(*threshold)
    assert importlib.import_module("colorsys").__name__ == "colorsys"


def test_bringing_in_what_is_not_installed_is_an_import_error():
    with pytest.raises(ImportError):
        quiet.bring_in("no_such_package_anywhere")
