"""Fixtures that tests of survival share."""

from faults import memory, quick  # noqa: F401
