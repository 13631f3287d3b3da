"""Fixtures of the tests that need the laboratory; they skip, with the reason, where it can't be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.lab import Lab, missing
from tests.support.topology import Topology, two_hosts


@pytest.fixture
def lab() -> Iterator[Lab]:
    """An empty laboratory."""
    if why_not := missing():
        pytest.skip(why_not)
    with Lab() as built:
        yield built


@pytest.fixture
def net(lab: Lab) -> Topology:
    """The usual one: see ``tests.support.topology``."""
    return two_hosts(lab)
