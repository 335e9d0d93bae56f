"""Settings that every test runs under: one thread a process, no network, and which tests run, in which order."""

import gc
import os
import signal

# Before torch and transformers are imported, here and in processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

gc.disable()  # until all tests are imported: looking for garbage again and again takes a third of that time

# A shell starts a command in the background with SIGINT ignored, and so would be all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that take half a minute and more, longest first.
LONGEST = [
    "test_stops", "test_layouts", "test_readme", "test_kills", "test_ema_triton", "test_pretrain", "test_reshape",
    "test_monitor", "test_killed_ranks", "test_cut_runs", "test_templates", "test_two_hosts", "test_watched_runs",
    "test_compile", "test_timestep_norm_triton", "test_attention_triton", "test_compiled_blocks",
    "test_compiled_runs", "test_plan_command", "test_roofline_command", "test_benchmark_commands", "test_damaged_runs",
    "test_engines", "test_bad_runs", "test_packaging", "test_packed_runs", "test_megalodon_runs", "test_disks",
    "test_hangs", "test_layout_checkpoints", "test_document_layouts", "test_odd_vocabulary", "test_native_keys",
    "test_accelerate", "test_readme_program", "test_token_stream", "test_tokenizers",
]  # fmt: skip
PLACES = {name: place for place, name in enumerate(LONGEST)}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A bare `pytest` leaves out what is slow, and takes two processes; what is named by file, folder or -m runs whole.

    It comes before pytest-xdist reads its options, -n among them, and runs in the processes that this starts, too.
    """
    option = config.option
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS or option.markexpr:
        return
    option.markexpr = "not slow"
    if option.numprocesses is None and not option.usepdb and not hasattr(config, "workerinput"):
        option.numprocesses, option.dist = 2, "loadfile"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, and then those that start ranks and launchers: no worker waits for another at the end."""

    def place(item: pytest.Item) -> tuple[int, bool]:
        marked = any(item.get_closest_marker(name) for name in ("distributed", "launch"))
        return PLACES.get(item.path.stem, len(PLACES)), not marked

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What imports made stays, and is not looked through for garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
