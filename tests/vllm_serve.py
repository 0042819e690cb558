"""Real vLLM servers on CPU for tests: processes of their own, with a tiny model."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError

ROOT = Path(__file__).parents[1]
START_S = 240  # each starts three processes that import torch and vLLM
FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-num-seqs", "64", "--max-num-batched-tokens", "1024")


@dataclass
class VLLMServer:
    """Runs from `start` to `kill`, with the model in `folder`. Its URL stays the same if it is started again."""

    folder: Path
    flags: tuple[str, ...]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    sockets: str = ""  # a folder for vLLM's, which it leaves behind when it is killed

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns at once: servers may start side by side."""
        self.sockets = tempfile.mkdtemp(prefix="otcrl-sockets-")
        own = {
            "VLLM_RPC_BASE_PATH": self.sockets,
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "PYTHONPATH": str(ROOT),
        }
        quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        address = ("--model", str(self.folder), "--host", "127.0.0.1", "--port", str(self.port))
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *address, *FLAGS, *self.flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, **own, **quiet, **self.environment},
                start_new_session=True,
            )

    @property
    def log(self) -> Path:
        return self.folder.parent / f"vllm-{self.port}.log"

    def wait(self) -> None:
        """Until it serves."""
        assert self.process is not None
        give_up = time.monotonic() + START_S
        while time.monotonic() < give_up and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (URLError, TimeoutError, ConnectionError):
                time.sleep(0.25)
        raise AssertionError(f"no server within {START_S} s: {self.log.read_text()[-2000:]}")

    def kill_core(self) -> None:
        """What computes is gone, and what answers is still there."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """With all its processes, as when its machine is lost."""
        if self.process is not None:
            for signaled in (how, signal.SIGKILL):  # one that lost its core may wait for it for ever
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signaled)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=8)
            self.process = None
            shutil.rmtree(self.sockets, ignore_errors=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
