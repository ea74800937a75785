"""Checkpoints to load."""

from tests.models.conftest import *  # noqa: F403
