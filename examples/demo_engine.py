"""One process of the demo: starts an engine per config, answers requests, writes what it measured.

    python demo_engine.py JOB.json

The job names the model, the kvstrata TOMLs, the requests, and where the results go. With "conversations"
the process first holds these with a plain vLLM without any cache, which gives the requests, the cold times
and the replies that all others must give. "first" and "last" choose among the requests, "passes" asks them
several times over. With "kill_after": n it kills itself with SIGKILL while blocks of a request after the
n-th are being saved.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm import LLM

from inprocess import Answer, ask, engine, store_of


def converse(llm: LLM, conversations: list[list[str]], system: str, progress: Path) -> list[dict[str, Any]]:
    """Real conversations: every turn's prompt holds the system prompt and all turns and replies before."""
    tokenizer = llm.get_tokenizer()
    requests = []
    ask(llm, tokenizer.encode(system)[::-1], max_tokens=2)  # warm up, with a prompt of the usual length
    for number, questions in enumerate(conversations):
        messages = [{"role": "system", "content": system}]
        for turn, question in enumerate(questions):
            messages.append({"role": "user", "content": question})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            prompt = tokenizer.encode(text)
            answer = ask(llm, prompt)
            messages.append({"role": "assistant", "content": tokenizer.decode(answer.tokens)})
            requests.append(
                {"conversation": number, "turn": turn, "prompt": prompt, "answer": asdict(answer)}
            )
            progress.write_text(str(len(requests)))
    return requests


def replay(
    llm: LLM, requests: list[dict[str, Any]], progress: Path, kill_after: int
) -> list[dict[str, Any]]:
    """The same prompts again; also says how many tokens of each came from kvstrata, and which tier."""
    store = store_of(llm)
    chunk_tokens = store.layout.block_tokens
    ask(llm, llm.get_tokenizer().encode("warm up"), max_tokens=2)
    results = []
    for number, request in enumerate(requests):
        if kill_after and number >= kill_after:
            _kill_while_saving(store)
        # Empty vLLM's own caches, so that whatever is not computed comes from kvstrata.
        llm.reset_prefix_cache(reset_connector=True)
        before = store.telemetry.counters()
        answer: Answer = ask(llm, request["prompt"])
        after = store.telemetry.counters()
        loaded = _loaded(after) - _loaded(before)
        results.append(
            {
                "answer": asdict(answer),
                "kvstrata_tokens": loaded * chunk_tokens,
                "damaged_blocks": _corrupt(after) - _corrupt(before),
                "blocks_by_tier": dict(_loaded_by_tier(after) - _loaded_by_tier(before)),
            }
        )
        progress.write_text(str(len(results)))
    return results


def _kill_while_saving(store: Any) -> None:
    def watch() -> None:
        while True:
            if store.queued["held_blocks"]:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.0001)

    threading.Thread(target=watch, daemon=True).start()


def _loaded(counters: dict[str, dict[tuple[str, ...], int]]) -> int:
    return sum(_loaded_by_tier(counters).values())


def _loaded_by_tier(counters: dict[str, dict[tuple[str, ...], int]]) -> Counter[str]:
    blocks = counters.get("blocks_total", {})
    served: Counter[str] = Counter()
    for (op, tier, outcome), count in blocks.items():
        if (op, outcome) == ("load", "loaded"):
            served[tier] += count
    return served


def _corrupt(counters: dict[str, dict[tuple[str, ...], int]]) -> int:
    misses = counters.get("misses_total", {})
    return sum(n for (_, reason), n in misses.items() if reason.startswith("corrupt"))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    progress = Path(job["progress"])
    if job.get("conversations"):
        with engine(Path(job["model"]), None) as llm:
            requests = converse(llm, job["conversations"], job["system"], progress)
        Path(job["requests"]).write_text(json.dumps(requests))
    everything = json.loads(Path(job["requests"]).read_text())
    requests = everything[job.get("first", 0) : job.get("last", len(everything))] * job.get("passes", 1)
    results = []
    for config in job["configs"]:
        with engine(Path(job["model"]), Path(config)) as llm:
            report = store_of(llm).status()[-1].open_report
            results.append(
                {
                    "opened": {
                        "blocks": report.restored,
                        "seconds": report.seconds,
                        "index": report.from_index,
                    },
                    "results": replay(llm, requests, progress, job.get("kill_after", 0)),
                }
            )
    Path(job["results"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
