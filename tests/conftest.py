"""Settings that every test runs under: one thread a process, and no network."""

import os

# Before torch and transformers are imported, here and in processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that start ranks and launchers, so that no worker waits for a long one at the end."""
    items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in ("distributed", "launch")))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
