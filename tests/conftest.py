"""For the whole suite: one Hypothesis profile, repeatable and never about time; long files first."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["backends.fixtures"]

settings.register_profile(
    "kvstrata",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("kvstrata")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine",
        choices=("auto", "threads", "io_uring"),
        help="what moves blocks of the nvme tier in every test that does not say so itself",
    )


def pytest_configure(config: pytest.Config) -> None:
    """In the environment, for `store_kit` and for processes that tests start."""
    if config.getoption("--engine"):
        os.environ["KVSTRATA_TEST_ENGINE"] = config.getoption("--engine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files go to processes in this order: an engine that starts last would leave the others idle."""
    first = {"vllm": 0, "store": 1}
    items.sort(key=lambda item: first.get(item.path.parent.name, 2))
