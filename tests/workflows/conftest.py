"""The miniature demo, finished once per session."""

import os
from pathlib import Path

import pytest
from workflows.miniature import finished_demo


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with recipes/, a finished run/, and what the command printed in `done`. Read only."""
    base = tmp_path_factory.getbasetemp()
    return finished_demo(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)
