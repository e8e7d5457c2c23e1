"""Stage: where the demos put their files, and how they start processes with real engines in them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

HERE = Path(__file__).parent
LICENSE = HERE.parent / "LICENSE"
"""The text that everybody talks about."""
BLOCKS_PER_CHUNK, BLOCK_TOKENS = 4, 32
CHUNK_TOKENS = BLOCKS_PER_CHUNK * BLOCK_TOKENS

QUESTIONS = [
    ["Which words of this passage speak of patents?", "And what ends a grant?"],
    ["May I use the name of the licensor?", "Not even to say where it comes from?"],
    ["What must I tell people when I change a file?", "And if there is a NOTICE file?"],
]
SHARED_PART = 0.6

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


class DemoError(Exception):
    """Something that the demo shows did not come true."""


def conversations(text: str) -> tuple[str, list[list[str]]]:
    """A long system prompt that all share, and for each conversation a passage of its own to talk about."""
    shared = int(len(text) * SHARED_PART)
    passage = (len(text) - shared) // len(QUESTIONS)
    talks = []
    for number, (first, *rest) in enumerate(QUESTIONS):
        start = shared + number * passage
        talks.append([f"{text[start : start + passage]}\n\n{first}", *rest])
    return text[:shared], talks


class Engine:
    """A process with engines in it. Used as a context, it does not outlive the with-block."""

    def __init__(self, stage: Stage, title: str, configs: list[Path], job: dict[str, Any]) -> None:
        self.title = title
        name = title.split(":", maxsplit=1)[0].replace(" ", "-")
        self._results, self._progress = stage.folder / f"{name}.results", stage.folder / f"{name}.progress"
        self._results.unlink(missing_ok=True)
        self._progress.write_text("0")
        spec = {
            "model": str(stage.model),
            "configs": [str(config) for config in configs],
            "requests": str(stage.requests_file),
            "results": str(self._results),
            "progress": str(self._progress),
            **job,
        }
        job_file = stage.folder / f"{name}.json"
        job_file.write_text(json.dumps(spec))
        self._log = stage.log
        with stage.log.open("a") as log:
            log.write(f"\n=== {title}\n")
            log.flush()
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "demo_engine.py"), str(job_file)], stdout=log, stderr=log
            )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for leak in Path("/dev/shm").glob("vllm_offload_kvstrata-*.mmap"):
            leak.unlink(missing_ok=True)

    @property
    def answered(self) -> int:
        """Requests so far."""
        return int(self._progress.read_text() or 0)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def results(self, expect_kill: bool = False) -> list[dict[str, Any]]:
        """What each of its engines measured, once it has ended; none if it was to be killed."""
        code = self._process.wait()
        if expect_kill and code == -signal.SIGKILL:
            return []
        if code != 0 or expect_kill:
            raise DemoError(f"{self.title}: the engine ended with {code}; see {self._log}")
        return list(json.loads(self._results.read_text()))


class Stage:
    """Files of one run. A model that everybody loads is made at the beginning."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = self.folder / "model"
        self.requests_file = self.folder / "requests.json"
        self.log = self.folder / "engines.log"
        self.log.write_text("")

    def make_model(self) -> None:
        """A random Llama and a tokenizer. Raises subprocess.CalledProcessError."""
        with console.status("making a random Llama and its tokenizer"):
            subprocess.run(
                [sys.executable, str(HERE / "tiny_llama.py"), str(self.model), str(LICENSE)],
                check=True, capture_output=True,
            )  # fmt: skip

    def fresh(self, name: str) -> Path:
        """The path of a folder of that name that is not there, or not any more."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def toml(self, name: str, text: str) -> Path:
        """The configuration of an engine."""
        path = self.folder / f"{name}.toml"
        path.write_text(text)
        return path

    def requests(self) -> list[dict[str, Any]]:
        """What plain vLLM was asked and answered, once an engine had conversations."""
        return list(json.loads(self.requests_file.read_text()))

    def run(
        self, title: str, configs: list[Path], expect_kill: bool = False, **job: Any
    ) -> list[dict[str, Any]]:
        """Start a process with an engine per config, one after the other, and wait for it."""
        with Engine(self, title, configs, job) as engine:
            watch(engine)
            return engine.results(expect_kill)

    def run_together(self, jobs: list[tuple[str, list[Path], dict[str, Any]]]) -> list[Engine]:
        """Several at the same time; returns them when all have ended."""
        with ExitStack() as stack:
            engines = [stack.enter_context(Engine(self, *job)) for job in jobs]
            watch(*engines)
        return engines


def watch(*engines: Engine) -> None:
    """Show how far they are until all have ended."""
    started = time.monotonic()
    title = " and ".join(engine.title for engine in engines)
    with console.status(title) as status:
        while any(engine.running for engine in engines):
            done = sum(engine.answered for engine in engines)
            status.update(f"{title}: {done} requests, {time.monotonic() - started:.0f} s")
            time.sleep(0.2)
    console.print(f"[green]done[/] {title} ({time.monotonic() - started:.0f} s)")
