"""Two replicas as people run them, one of them killed again and again: no answer is lost, late, or another's."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from otcrl.errors import ToolUnavailable
from otcrl.tools.retrieval.build import build_index
from otcrl.tools.retrieval.corpus import Passage
from otcrl.tools.retrieval.encode import HashingEncoder
from otcrl.tools.search import SearchTool

CLIENTS = 64
SECONDS = 120.0 if os.environ.get("OTCRL_LONG") else 8.0
TIMEOUT_S = 10.0
PASSAGES = [Passage(str(i), f"Subject {i}", f"Subject {i} is what the number {i} stands for.") for i in range(500)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Replica:
    """`otcrl serve retrieval` on a port that stays the same."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "otcrl.cli", "serve", "retrieval", f"index={self.directory}"]
        self.process = subprocess.Popen([*command, f"port={self.port}"], stdout=subprocess.DEVNULL)

    def is_warm(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def replicas(directory: Path, count: int) -> Iterator[list[Replica]]:
    started = [Replica(directory) for _ in range(count)]
    try:
        while not all(replica.is_warm() for replica in started):
            time.sleep(0.1)
        yield started
    finally:
        for replica in started:
            replica.kill()


@dataclass
class Outcomes:
    seconds: list[float] = field(default_factory=list)  # of every query
    failures: list[str] = field(default_factory=list)
    kills: int = 0


async def kill_now_and_then(replica: Replica, until: float, outcomes: Outcomes) -> None:
    while time.monotonic() < until:
        await asyncio.sleep(random.uniform(0.2, 1.5))
        replica.kill()
        outcomes.kills += 1
        await asyncio.sleep(random.uniform(0.0, 0.5))
        replica.start()
        while time.monotonic() < until and not await asyncio.to_thread(replica.is_warm):
            await asyncio.sleep(0.1)


async def ask(tool: SearchTool, expected: dict[str, str], until: float, outcomes: Outcomes) -> None:
    """What one client does."""
    while time.monotonic() < until:
        question, begun = random.choice(list(expected)), time.monotonic()
        try:
            assert (await tool.run(question)).text == expected[question]
        except ToolUnavailable as error:
            outcomes.failures.append(str(error))
        outcomes.seconds.append(time.monotonic() - begun)


async def soak(urls: list[str], victim: Replica, directory: Path) -> Outcomes:
    questions = [f"what does Subject {number} stand for?" for number in range(len(PASSAGES))]
    here = SearchTool(index=str(directory), topk=1)
    expected = {question: (await here.run(question)).text for question in questions}
    await here.close()
    tool = SearchTool(urls=urls, topk=1, cache_size=0, timeout_s=TIMEOUT_S)
    await tool.start()
    until, outcomes = time.monotonic() + SECONDS, Outcomes()
    clients = [ask(tool, expected, until, outcomes) for _ in range(CLIENTS)]
    await asyncio.gather(*clients, kill_now_and_then(victim, until, outcomes))
    await tool.close()
    return outcomes


def test_every_query_is_answered_or_fails_by_name_in_time_while_a_replica_dies_and_comes_back(tmp_path: Path):
    build_index(PASSAGES, HashingEncoder(dimension=512), tmp_path / "index")
    with replicas(tmp_path / "index", 2) as both:
        outcomes = asyncio.run(soak([replica.url for replica in both], both[0], tmp_path / "index"))
    print(f"{len(outcomes.seconds)} queries, {len(outcomes.failures)} failed by name, {outcomes.kills} kills")
    assert outcomes.kills >= 1
    assert len(outcomes.seconds) >= 10 * CLIENTS
    assert max(outcomes.seconds) < TIMEOUT_S + 2
    assert all("http://127.0.0.1" in failure or "timeout_s" in failure for failure in outcomes.failures)
    assert len(outcomes.failures) <= len(outcomes.seconds) / 100  # the other replica is there all the time
