"""What every test may rely on."""

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side
signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background Ctrl-C would reach no child


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data that lies beside the checkout of some developers."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the reference data in {folder.name}/ beside the checkout")
    return folder
