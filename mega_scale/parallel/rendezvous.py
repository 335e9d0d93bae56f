"""Where the ranks of a run find each other: a key-value store at MASTER_ADDR:MASTER_PORT, before any process group."""

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True)
class Rendezvous:
    """The store, seen from one rank.

    Args:
        store: connection of the main thread and of the process group.
        watch: a second connection. One that hangs holds up everybody who shares it, so the monitor has its own.
        address: of the store, host:port.
        launchers: whether the launcher keeps it; else rank 0 does.
        hosted: whether this process keeps it, so that it is gone when the process ends.
    """

    store: dist.Store
    watch: dist.Store
    address: str
    launchers: bool
    hosted: bool


def connect(rank: int, timeout_s: float) -> Rendezvous:
    """Reach the store: torchrun's agents keep one; under other launchers rank 0 does.

    Args:
        rank: number of this process.
        timeout_s: longest wait for the store, and of each operation on it (seconds).

    Returns:
        Two connections, whose keys no other program and no earlier attempt of the launcher shares.

    Raises:
        ConnectionError: the address cannot be reached in time, or rank 0 cannot listen on it; names the address.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    hosted = rank == 0 and not agent
    deadline = time.monotonic() + timeout_s
    if not hosted:
        _reach(host, port, deadline)
    try:
        stores = [
            dist.TCPStore(
                host,
                port,
                is_master=hosted and first,
                # The constructor tries twice.
                timeout=timedelta(seconds=max(deadline - time.monotonic(), 1.0) / 2),
                wait_for_workers=False,
                multi_tenant=True,
            )
            for first in (True, False)
        ]
    except dist.DistError as error:
        problem = "this rank cannot keep the key-value store" if hosted else "the key-value store does not answer"
        reason = (str(error).splitlines() or [""])[0]
        raise ConnectionError(
            f"{problem} at {host}:{port} (MASTER_ADDR, MASTER_PORT): {reason}; choose another port, and an address of "
            "rank 0's host that all hosts can reach"
        ) from None
    for store in stores:
        store.set_timeout(timedelta(seconds=timeout_s))
    # torchrun's store outlives a restart of its workers.
    prefix = f"mega_scale/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    main, watch = (dist.PrefixStore(prefix, store) for store in stores)
    return Rendezvous(main, watch, f"{host}:{port}", agent, hosted)


def _reach(host: str, port: int, deadline: float) -> None:
    """Wait until something listens. TCPStore would too, but for up to twice its timeout, and with pages of traces."""
    pause = _FIRST_PAUSE_S
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), _FIRST_PAUSE_S)):
                return
        except OSError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ConnectionError(
                    f"{host}:{port} (MASTER_ADDR, MASTER_PORT) cannot be reached: {error}; see whether rank 0 started, "
                    "and whether this host resolves that name and may connect to that port"
                ) from None
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE_S)
