"""The finished miniature demo, for the commands that need a run."""

from workflows.conftest import miniature as miniature
