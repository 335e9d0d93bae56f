"""Where the ranks of a run find each other: a key-value store at MASTER_ADDR:MASTER_PORT, before any process group."""

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from mega_scale.parallel.placement import PORT_OPTIONS, meeting_point, placement

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_NAMES_TAKE_S = 20.0  # a cluster may announce a host's name after its processes have started
_ANSWERS_TAKE_S = 5.0  # what listens at the address is another program if it does not answer as our store by then
_REMEDY = f"choose another port ({PORT_OPTIONS}), and an address of rank 0's host that all hosts can reach"


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


def connect(timeout_s: float) -> Rendezvous:
    """Reach the store: torchrun's agents keep one; under other launchers rank 0 does.

    Args:
        timeout_s: longest wait for the store, and of each operation on it (seconds).

    Returns:
        Two connections, whose keys no other program and no earlier attempt of the launcher shares.

    Raises:
        ConnectionError: the address cannot be reached in time, rank 0 cannot listen on it, or another program or run
            does; names the address.
    """
    place = placement()
    host, port = meeting_point(place)
    address = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    hosted = place.rank == 0 and not agent
    deadline = time.monotonic() + timeout_s
    _resolve(host, port, min(deadline, time.monotonic() + _NAMES_TAKE_S))
    if not hosted:
        _reach(host, port, deadline)
    left = max(deadline - time.monotonic(), 1.0)

    def build() -> list[dist.Store]:
        timeout = timedelta(seconds=left / 2)  # the constructor tries twice
        return [
            dist.TCPStore(
                host, port, is_master=hosted and first, timeout=timeout, wait_for_workers=False, multi_tenant=True
            )
            for first in (True, False)
        ]

    try:
        stores = _within(left if hosted or agent else min(left, _ANSWERS_TAKE_S), build)
    except TimeoutError:
        raise ConnectionError(f"what listens at {address} is no key-value store of this run: {_REMEDY}") from None
    except dist.DistError as error:
        problem = "this rank cannot keep the key-value store" if hosted else "the key-value store does not answer"
        reason = (str(error).splitlines() or [""])[0]
        raise ConnectionError(f"{problem} at {address}: {reason}; {_REMEDY}") from None
    for store in stores:
        store.set_timeout(timedelta(seconds=timeout_s))
    # torchrun's store outlives a restart of its workers.
    prefix = f"mega_scale/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    main, watch = (dist.PrefixStore(prefix, store) for store in stores)
    if hosted:
        main.set("size", str(place.size))
    elif not agent:
        _check_ours(main, place.rank, place.size, address)
    return Rendezvous(main, watch, f"{host}:{port}", agent, hosted)


def _within(longest_s: float, build: Callable[[], list[dist.Store]]) -> list[dist.Store]:
    """Build stores in another thread, as a program that accepts a connection and says nothing is waited for forever.

    Raises:
        TimeoutError: it takes longer.
    """
    found: list[list[dist.Store] | dist.DistError] = []

    def work() -> None:
        try:
            found.append(build())
        except dist.DistError as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(longest_s)
    if not found:
        raise TimeoutError
    if isinstance(found[0], dist.DistError):
        raise found[0]
    return found[0]


def _check_ours(store: dist.Store, rank: int, size: int, address: str) -> None:
    """See that rank 0 of this run keeps the store: where it could not listen, that of another run may be there."""
    try:
        store.wait(["size"], timedelta(seconds=_ANSWERS_TAKE_S))
    except dist.DistError:
        raise ConnectionError(f"the key-value store at {address} is another program's: {_REMEDY}") from None
    if store.get("size").decode() != str(size) or store.add(f"came/{rank}", 1) > 1:
        raise ConnectionError(f"another run meets at {address}: {_REMEDY}")


def _resolve(host: str, port: int, deadline: float) -> None:
    """Wait until the name of the host is known."""
    while True:
        try:
            socket.getaddrinfo(host, port)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() + _LONGEST_PAUSE_S > deadline:
                raise ConnectionError(
                    f"MASTER_ADDR={host!r} cannot be resolved on this host ({error}): give an address of rank 0's "
                    "host, or a name that every host resolves"
                ) from None
        time.sleep(_LONGEST_PAUSE_S)


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
