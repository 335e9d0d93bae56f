"""Where the ranks of a run meet, and how one learns that another has died, failed or cannot be reached.

Ranks meet in a key-value store at MASTER_ADDR:MASTER_PORT, before any process group. Each writes a beat into it and
reads two keys: the news, one key for all, and the beat of the next rank; the ring goes round, and ranks that have left
are skipped. So a beat costs a rank two small messages however many ranks there are. Only the rank before a silent one
looks at all of them, once, to say who else is silent.

The first cause wins: the news key changes once, atomically, from WELL or ALARM to a verdict, which all ranks print.
ALARM is what a rank says whose collective failed: it is a victim, and does not know of whom. It makes all ranks less
patient, so that the culprit is known within seconds.

HANG is what a rank says that has made no progress for too long. All ranks wait for one, so all stand still; on this
word each says where it stands, and the verdict names those that are behind.
"""

import contextlib
import json
import math
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mega_scale.parallel.mesh import PORT_OPTIONS, meeting_point, placement
from mega_scale.process import PEER_LOST, Standing, write_stderr

WELL, ALARM, HANG, LEFT = "well", "alarm", "hang", "left"

_LONGEST_BEAT_S = 1.0
# In beats. A silent rank is given up at 30 of the timeout's 40, so that all ranks have ended when the timeout is over.
# That is after 30 s, however long collectives may take: a process that lives beats whatever it computes.
_TIMEOUT, _PATIENCE, _PATIENCE_IN_ALARM, _ANSWERS_TAKE, _VICTIM_WAITS, _NEWS_SPREAD, _LOOKS = 40, 30, 5, 5, 12, 2, 3
_REASON_LENGTH, _NAMED = 300, 16
_REMEDY = "see its output and the network, then start the run again with --resume"

_CONNECTIONS, _OTHER_FILES = 2, 512  # of each rank to the store; what else the process that keeps it has open
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_NAMES_TAKE_S = 20.0  # a cluster may announce a host's name after its processes have started
_ANSWERS_TAKE_S = 5.0  # what listens at the address is another program if it does not answer as our store by then
_OTHER_ADDRESS = f"choose another port ({PORT_OPTIONS}), and an address of rank 0's host that all hosts can reach"


def connect(timeout_s: float) -> tuple[dist.Store, dist.Store, str, bool]:
    """Reach the store within a time (seconds): torchrun's agents keep one; under other launchers rank 0 does.

    No other program and no earlier attempt of the launcher shares its keys. Raises ConnectionError, which names the
    address, where it cannot be reached in time, rank 0 cannot listen on it, or another program or run does.

    Returns a connection for the main thread and the process group, one for the monitor (one that hangs holds up all who
    share it), host:port, and whether the launcher keeps the store.
    """
    place = placement()
    host, port = meeting_point(place)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    hosted = place.rank == 0 and not agent
    deadline = time.monotonic() + timeout_s
    if hosted:
        _allow_connections(place.size)
    _reach(host, port, deadline, listens=not hosted)
    left = max(deadline - time.monotonic(), 1.0)
    found: list[Any] = []

    def build() -> None:
        timeout = timedelta(seconds=left / 2)  # the constructor tries twice
        try:
            for keeps in (hosted, False):
                found.append(dist.TCPStore(host, port, None, keeps, timeout, wait_for_workers=False, multi_tenant=True))
        except dist.DistError as error:
            found.append(error)

    def problem(what: str) -> ConnectionError:
        return ConnectionError(f"at {host}:{port} (MASTER_ADDR, MASTER_PORT), {what}; {_OTHER_ADDRESS}")

    # In another thread, as a program that accepts a connection and says nothing is waited for forever.
    thread = threading.Thread(target=build, daemon=True)
    thread.start()
    thread.join(left if hosted or agent else min(left, _ANSWERS_TAKE_S))
    if thread.is_alive():
        raise problem("what listens is no key-value store of this run")
    if isinstance(found[-1], dist.DistError):
        what = "this rank cannot keep the key-value store" if hosted else "the key-value store does not answer"
        raise problem(f"{what}: {(str(found[-1]).splitlines() or [''])[0]}")
    # torchrun's store outlives a restart of its workers.
    prefix = f"mega_scale/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    main, watch = (dist.PrefixStore(prefix, store) for store in found)
    for store in (main, watch):
        store.set_timeout(timedelta(seconds=timeout_s))
    if hosted:
        main.set("size", str(place.size))
    elif not agent:
        # Where rank 0 of this run could not listen, that of another run may be there.
        try:
            main.wait(["size"], timedelta(seconds=_ANSWERS_TAKE_S))
        except dist.DistError:
            raise problem("the key-value store is another program's") from None
        if main.get("size").decode() != str(place.size) or main.add(f"came/{place.rank}", 1) > 1:
            raise problem("another run meets")
    return main, watch, f"{host}:{port}", agent


def _allow_connections(ranks: int) -> None:
    """Let this process have the files open that a store for so many ranks needs: often the limit is 1,024, which shells
    inherit and a process may raise. Raises ConnectionError where it may not."""
    needed = _CONNECTIONS * ranks + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in (resource.RLIM_INFINITY, -1) or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConnectionError(
            f"rank 0's host lets a process have {hard} files open, and {ranks} ranks need {needed} for their key-value "
            f"store: raise the hard limit there to {needed} (ulimit -Hn, LimitNOFILE), or start with torchrun"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _reach(host: str, port: int, deadline: float, listens: bool) -> None:
    """Wait until the host's name is known, and until something listens there if it has to.

    TCPStore would wait too, but for up to twice its timeout, and with pages of traces.
    """
    names_known, pause = min(deadline, time.monotonic() + _NAMES_TAKE_S), _FIRST_PAUSE_S
    while True:
        try:
            socket.getaddrinfo(host, port)
            if listens:
                socket.create_connection((host, port), max(deadline - time.monotonic(), _FIRST_PAUSE_S)).close()
            return
        except (OSError, UnicodeError) as error:
            unknown = isinstance(error, (socket.gaierror, UnicodeError))
            pause = min(2 * pause, _LONGEST_PAUSE_S, (names_known if unknown else deadline) - time.monotonic())
            if pause <= 0:
                raise ConnectionError(
                    f"MASTER_ADDR={host!r} cannot be resolved on this host ({error}): give an address of rank 0's "
                    "host, or a name that every host resolves"
                    if unknown
                    else f"{host}:{port} (MASTER_ADDR, MASTER_PORT) cannot be reached: {error}; see whether rank 0 "
                    "started, and whether this host resolves that name and may connect to that port"
                ) from None
        time.sleep(pause)


class PeerMonitor:
    """One rank's watch over the others; see the file's head. Making one is collective: all ranks, two or more, meet.

    When a rank is lost, all others have ended within a minute, and within `timeout_s`. Two threads: one talks to the
    store, which is also for the process group, and hangs if the store's host cannot be reached; the other notices that.

    Raises SystemExit where the store cannot be reached in time, after a line with its address. Where not all ranks
    come, the process ends with a line that names them. The exit code is 75.
    """

    def __init__(self, rank: int, size: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._name = f"rank {rank} ({socket.gethostname()})"
        self._beat_s = min(_LONGEST_BEAT_S, timeout_s / _TIMEOUT)
        try:
            self.store, self._own_store, self._address, agent = connect(timeout_s)
        except ConnectionError as error:
            self._say(str(error))
            raise SystemExit(PEER_LOST) from None
        self._hosted = rank == 0 and not agent  # so that the store is gone when this process ends
        self._keeper = "the launcher" if agent else "rank 0"

        # What the main thread asks of the talking one, and its answers.
        self._report: str | None = None
        self._leaving = self._failed = self._hang = False
        self._wake, self._told, self._stopped = threading.Event(), threading.Event(), threading.Event()

        # What is known of the others.
        self._met = self._alarm = False
        self._contact = self._heard = time.monotonic()
        self._next = (rank + 1) % size
        self._next_beat = ""
        self._sample: tuple[float, list[str]] | None = None

        # How to answer a hang, and when to judge it: 0 until this rank has answered, then never on all but one.
        self._standing: Callable[[], Standing] = lambda: Standing(0, 0, "start-up", 0.0)
        self._before_end: Callable[[str], None] | None = None
        self._judges_at = 0.0

        self._ending = threading.Lock()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._watch_contact)]
        self._meet(deadline)

    def watch(self, standing: Callable[[], Standing], before_end: Callable[[str], None] | None) -> None:
        """Let this rank be asked where it stands; both functions are called in another thread.

        `standing` prints this rank's stacks, once, when some rank declares a hang. `before_end` gets the verdict before
        this process ends because of another rank; it is not waited for longer than news take to spread.
        """
        self._standing, self._before_end = standing, before_end

    def declare_hang(self) -> None:
        """Have all ranks say where they stand, and end: this one makes no progress; may be called twice."""
        self._hang = True
        self._wake.set()

    def leave(self, error: BaseException | None) -> None:
        """Say that this rank has done its work, so that nobody misses it, or with which error its main thread ends.

        The rank that keeps the store waits for all to be done, at most the timeout: they would take it for dead. If a
        collective failed, the process ends with the line that names the culprit, if one is found within seconds; else
        this rank is named as the one that failed, and lives on until the others have read why.
        """
        if error is None:
            self._leaving = True
            self._tell(_PATIENCE)
            if self._hosted:
                with contextlib.suppress(dist.DistError):  # a rank that works on and on is no failure of this one
                    self.store.wait(["all left"], timedelta(seconds=self._timeout_s))
        else:
            if _failed_by_others(error):
                self._alarm = True
                self._wake.set()
                time.sleep(_VICTIM_WAITS * self._beat_s)
            self._failed = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:_REASON_LENGTH]
            self._report = f"{self._name} failed: {reason}; its own output says more"
            self._tell(_VICTIM_WAITS)
            time.sleep(_NEWS_SPREAD * self._beat_s)  # the store, or neighbours, may end with this rank
        # A thread that comes back from the store while the interpreter ends aborts the process.
        self._stopped.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(_NEWS_SPREAD * self._beat_s)

    def _meet(self, deadline: float) -> None:
        """Wait for all ranks; ends this process, and those that came, if they do not come."""
        store = self.store
        store.compare_set("news", "", WELL)
        store.set(f"host/{self._rank}", socket.gethostname())
        store.set(f"beat/{self._rank}", "0")
        for thread in self._threads:
            thread.start()
        if store.add("arrived", 1) == self._size:
            store.set("all arrived", "")
        try:
            store.wait(["all arrived"], timedelta(seconds=max(deadline - time.monotonic(), self._beat_s)))
            if self._keeper == "rank 0":
                self._keeper = self._where([0])
            self._heard = time.monotonic()
            self._met = True
            return
        except dist.DistNetworkError:
            verdict = f"the key-value store at {self._address} was lost while ranks met; see {self._keeper}'s output"
        except dist.DistError:
            missing = [rank for rank in range(self._size) if not store.check([f"host/{rank}"])]
            verdict = (
                f"of {self._size} ranks, {_ranks(missing)} did not come to {self._address} within "
                f"{self._timeout_s:g} s; see whether every host was started, with the same address and number of "
                "hosts, and what they printed"
            )
        self._report = verdict
        self._tell(_VICTIM_WAITS)
        self._end(verdict)

    def _tell(self, longest: int) -> None:
        """Have the talking thread say at once what there is to say; waits for it so many beats at most."""
        self._wake.set()
        self._told.wait(longest * self._beat_s)

    def _patience_s(self) -> float:
        return (_PATIENCE_IN_ALARM if self._alarm else _PATIENCE) * self._beat_s

    def _talk(self) -> None:
        beats = 0
        while not self._stopped.is_set():
            beats += 1
            try:
                self._exchange(str(beats))
            except RuntimeError:
                # The connection broke, so the process that keeps the store is gone, and the store with it.
                self._alarm = True
                self._told.set()  # as far as it can be
                return
            self._wake.wait(self._beat_s)
            self._wake.clear()

    def _exchange(self, beat: str) -> None:
        store, leaving, report = self._own_store, self._leaving, self._report
        store.set(f"beat/{self._rank}", LEFT if leaving else beat)
        if self._alarm:
            store.compare_set("news", WELL, ALARM)
        if report is not None:
            self._publish(report)
        if self._hang:
            store.compare_set("news", WELL, HANG)
        if leaving and not self._told.is_set() and store.add("left", 1) == self._size:
            store.set("all left", "")
        watched = [f"beat/{self._next}"] if self._met and self._next != self._rank else []
        news, *beats = (value.decode() for value in store.multi_get(["news", *watched]))
        self._contact = time.monotonic()
        if leaving or report is not None:
            self._told.set()
        if news == ALARM:
            self._alarm = True
        elif news == HANG and not self._judges_at:
            # The first rank that says where it stands waits for the others, and names those that are behind.
            store.set(f"standing/{self._rank}", json.dumps(self._standing()))
            first = store.add("answers", 1) == 1
            self._judges_at = time.monotonic() + _ANSWERS_TAKE * self._beat_s if first else math.inf
        elif news == HANG:
            if time.monotonic() > self._judges_at:
                self._publish(self._judgement())
        elif news != WELL and not self._failed:
            self._end(news)
        if beats:
            self._look(beats[0])

    def _judgement(self) -> str:
        """Name the ranks that did not answer, if any, as that others are behind follows from it; else those behind."""
        answered = [rank for rank in range(self._size) if self._own_store.check([f"standing/{rank}"])]
        texts = self._read("standing", answered)
        found = {rank: Standing(*json.loads(text)) for rank, text in zip(answered, texts, strict=True)}
        if mute := [rank for rank in range(self._size) if rank not in found]:
            idle_s = max(standing.idle_s for standing in found.values())
            said = (
                f"{self._where(mute)} gave no sign of life when asked, after {idle_s:.0f} s without progress: died, "
                f"cannot be reached, or hang{'s' if len(mute) == 1 else ''} while keeping Python's lock"
            )
        else:
            at = min(found.values(), key=lambda standing: standing.beats)
            behind = [rank for rank, standing in found.items() if standing.beats == at.beats]
            said = (
                f"{self._where(behind)} hang{'s' if len(behind) == 1 else ''}: no progress for {at.idle_s:.0f} s in "
                f"step {at.step}, {at.phase}{'; the others wait' if len(behind) < self._size else ''}"
            )
        return f"{said}; the stacks of every rank are in its output; start the run again with --resume"

    def _look(self, beat: str) -> None:
        """Compare the next rank's beat with the last one; by this host's clock, since hosts' clocks differ."""
        now, patience = time.monotonic(), self._patience_s()
        if beat != self._next_beat:
            if beat == LEFT:
                self._next, beat = (self._next + 1) % self._size, ""
            self._next_beat, self._heard, self._sample = beat, now, None
        elif self._sample is None:
            if now - self._heard > patience / 2:
                self._sample = now, self._read("beat", range(self._size))
        elif now - self._heard > patience and now - self._sample[0] > patience / 2:
            both = enumerate(zip(self._sample[1], self._read("beat", range(self._size)), strict=True))
            silent = [rank for rank, (old, new) in both if old == new != LEFT and rank != self._rank]
            self._sample = None
            if self._next in silent:
                self._publish(
                    f"{self._where(silent)} gave no sign of life for {now - self._heard:.0f} s: died, or cannot be "
                    f"reached; {_REMEDY}"
                )

    def _read(self, what: str, ranks: Iterable[int]) -> list[str]:
        return [value.decode() for value in self._own_store.multi_get([f"{what}/{rank}" for rank in ranks])]

    def _where(self, ranks: list[int]) -> str:
        found: dict[str, list[int]] = {}
        for rank, host in zip(ranks, self._read("host", ranks), strict=True):
            found.setdefault(host, []).append(rank)
        return ", ".join(f"{_ranks(there)} ({host})" for host, there in found.items())

    def _publish(self, verdict: str) -> None:
        for before in (WELL, ALARM, HANG):
            self._own_store.compare_set("news", before, verdict)

    def _watch_contact(self) -> None:
        looks = 0
        while not self._stopped.wait(self._beat_s):
            silent = time.monotonic() - self._contact
            # Several looks: a process that was suspended has not listened either.
            looks = looks + 1 if silent > self._patience_s() else 0
            if looks >= _LOOKS and not self._failed:
                what = "has not answered" if self._threads[0].is_alive() else "has been lost"
                self._end(
                    f"{self._keeper}, which keeps the key-value store at {self._address}, {what} for {silent:.0f} s: "
                    f"died, or cannot be reached; {_REMEDY}"
                )

    def _say(self, verdict: str) -> None:
        write_stderr(f"error: {self._name} ends with exit code {PEER_LOST}: {' '.join(verdict.split())}")

    def _end(self, verdict: str) -> None:
        """End this process, whatever its main thread waits for."""
        if self._ending.acquire(blocking=False):
            self._say(verdict)
            if self._before_end is not None:
                # What it does may hang where the main thread does, in a file system perhaps.
                threading.Thread(target=self._before_end, args=(verdict,), daemon=True).start()
        # A launcher ends a host's other ranks with the first.
        time.sleep(_NEWS_SPREAD * self._beat_s)
        with contextlib.suppress(OSError):  # of a full disk, or a reader that left: this process ends all the same
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(PEER_LOST)


def tell_refusal(rank: int, why: object, hurry: Callable[[], object], longest_s: float = 5.0) -> bool:
    """Tell the ranks that have come to meet that this one is refused before it does; they end, and print why.

    A refusal is mostly that of all ranks, and the first one prints it. So a rank other than the first looks for
    `longest_s`, or until `hurry` says to give up, whether that one has come, which it does only if it is not refused.
    Returns whether it had, so that this one has to print the refusal.
    """
    deadline, store = time.monotonic() + longest_s, None
    while time.monotonic() < deadline and not hurry():
        with contextlib.suppress(ConnectionError, dist.DistError):
            store = store or connect(_LONGEST_BEAT_S)[0]
            if store.check(["host/0"]):  # waiting for it would print warnings
                store.compare_set("news", "", WELL)
                reason = " ".join(str(why).split())[:_REASON_LENGTH]
                store.compare_set("news", WELL, f"rank {rank} ({socket.gethostname()}) was refused: {reason}")
                return True
        time.sleep(_FIRST_PAUSE_S)
    return False


def _failed_by_others(error: BaseException | None) -> bool:
    """Whether the error, or what it came from, is one that a process group or store raises when others are gone."""
    while error is not None:
        # gloo's are plain RuntimeErrors that begin with its source file.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _ranks(ranks: list[int]) -> str:
    names = ", ".join(str(rank) for rank in ranks[:_NAMED])
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {names}{more}"
