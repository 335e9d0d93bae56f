"""Two hosts, which are network namespaces with a cable between them: the losses of one process, and a cut cable."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

import psutil
import pytest
from launching import ROOT, TINY, metrics, pretrain
from test_pretrain import NO_DROPOUT, text

pytestmark = [pytest.mark.launch, pytest.mark.slow]

ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
PORT = "29621"
TIMEOUT_S = 20


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Host(NamedTuple):
    """A network namespace."""

    name: str
    namespace: str
    cable: str
    names: pathlib.Path

    def command(self, *command):
        """The command, run on this host: in its network, under its name, with a directory of both hosts' names."""
        become = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        space = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", become, "sh"]
        return [*space, self.name, str(self.names), *command]

    def cut(self):
        ip("-n", self.namespace, "link", "set", self.cable, "down")

    def plug(self):
        ip("-n", self.namespace, "link", "set", self.cable, "up")


@pytest.fixture
def hosts(tmp_path):
    missing = [tool for tool in ("ip", "unshare", "hostname", "mount") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs the programs {', '.join(missing)}")
    names = tmp_path / "names"
    names.write_text(
        "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **ADDRESSES}.items())
    )
    found = [Host(name, f"{name}-{os.getpid()}", f"cable{os.getpid()}{name[-1]}", names) for name in ADDRESSES]
    try:
        _plug_in(*found)
        yield found
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs the right to make network namespaces (root): {error.stderr.strip()}")
    finally:
        for host in found:
            subprocess.run(["ip", "netns", "delete", host.namespace], check=False, capture_output=True)


def _plug_in(one, other):
    for host in (one, other):
        ip("netns", "add", host.namespace)
    peer = ["peer", "name", other.cable, "netns", other.namespace]
    ip("link", "add", one.cable, "netns", one.namespace, "type", "veth", *peer)
    for host in (one, other):
        ip("-n", host.namespace, "address", "add", f"{ADDRESSES[host.name]}/24", "dev", host.cable)
        for device in ("lo", host.cable):
            ip("-n", host.namespace, "link", "set", device, "up")
    subprocess.run(one.command("true"), check=True, capture_output=True, text=True)


def launcher(kind, node, hostfile, ranks):
    """What is typed on one host."""
    if kind == "deepspeed":
        return [
            "deepspeed", "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node), "--master_addr", "host-a",
            "--master_port", PORT, "launch/pretrain.py",
        ]  # fmt: skip
    if kind == "accelerate":
        # --multi_gpu is how accelerate starts several processes of a machine, GPUs or not.
        return [
            "accelerate", "launch", "--multi_gpu", "--num_machines", "2", "--num_processes", str(2 * ranks),
            "--machine_rank", str(node), "--main_process_ip", "host-a", "--main_process_port", PORT,
            "--mixed_precision", "no", "--dynamo_backend", "no", "launch/pretrain.py",
        ]  # fmt: skip
    meeting = {
        "torchrun c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"host-a:{PORT}"],
        "torchrun": ["--node-rank", str(node), "--master-addr", "host-a", "--master-port", PORT],
    }
    return ["torchrun", "--nnodes", "2", "--nproc-per-node", str(ranks), *meeting[kind], "launch/pretrain.py"]


class Job:
    """A run on both hosts: one launcher each, whose output goes to a file."""

    def __init__(self, kind, hosts, folder, ranks, *changes):
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{host.name} slots={ranks}\n" for host in hosts))
        self.run_dir = folder / "run"
        self.outputs = [folder / f"{host.name}.txt" for host in hosts]
        engine = "deepspeed" if kind == "deepspeed" else "fsdp"
        settings = [*TINY, *NO_DROPOUT, f"run_dir={self.run_dir}", f"parallel.engine={engine}", *changes]
        self.processes = []
        for node, (host, output) in enumerate(zip(hosts, self.outputs, strict=True)):
            environment = {
                **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": host.cable,
                "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
            }  # fmt: skip
            command = host.command(*launcher(kind, node, hostfile, ranks), *settings)
            with output.open("w") as file:
                self.processes.append(subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                ))  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.processes:
            process.wait()

    def family(self):
        """All processes of this run, wherever they hang in the process tree."""
        found = psutil.process_iter(["cmdline", "status"])
        mine = [p for p in found if f"run_dir={self.run_dir}" in (p.info["cmdline"] or [])]
        return [p for p in mine if p.info["status"] != psutil.STATUS_ZOMBIE]

    def ranks(self):
        """Those that compute; their launchers have the script further back on their command line."""
        return [p for p in self.family() if "launch/pretrain.py" in p.info["cmdline"][:3]]

    def until(self, wanted, timeout):
        """Wait until `wanted()`; seconds that it took."""
        began = time.monotonic()
        while not wanted():
            assert time.monotonic() < began + timeout and not (self.ended() and not wanted()), self.report()
            time.sleep(0.1)
        return time.monotonic() - began

    def ended(self):
        return all(process.poll() is not None for process in self.processes)

    def report(self):
        return "\n".join(f"{path.name}:\n{path.read_text()[-8000:]}" for path in self.outputs)

    def trained(self, steps):
        return self.outputs[0].read_text().count("| loss") >= steps

    def lines(self, host):
        """What the ranks of one host said about their end, by rank."""
        found = [line for line in self.outputs[host].read_text().splitlines() if line.startswith("error: ")]
        return dict(sorted((int(line.split()[2]), line) for line in found))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text_file):
    """Twenty steps in one process."""
    run_dir = tmp_path_factory.mktemp("alone")
    pretrain("forked", run_dir, *text(text_file), *NO_DROPOUT, "train.steps=20", "parallel.engine=fsdp")
    return metrics(run_dir)


@pytest.mark.parametrize(
    "kind,changes,interrupted",
    [
        ("deepspeed", ["parallel.sp=2"], False),
        ("torchrun c10d", [], True),
        ("accelerate", ["parallel.dp_replicate=2"], False),
    ],
)
def test_two_hosts_give_the_losses_of_one_process(hosts, tmp_path, text_file, alone, kind, changes, interrupted):
    """With the cable cut for 8 seconds, too, which is shorter than the timeout."""
    with Job(kind, hosts, tmp_path, 1, *text(text_file), "train.steps=20", *changes) as job:
        if interrupted:
            job.until(lambda: job.trained(3), 300)
            hosts[1].cut()
            done = job.outputs[0].read_text().count("| loss")
            time.sleep(8)
            assert not job.ended() and not job.trained(done + 2), job.report()
            hosts[1].plug()
        job.until(job.ended, 300)
        assert [process.returncode for process in job.processes] == [0, 0], job.report()
        assert job.lines(0) == job.lines(1) == {}
    got = metrics(job.run_dir)
    assert list(got) == list(alone) == list(range(1, 21))
    for step, row in alone.items():
        assert got[step]["loss"] == pytest.approx(row["loss"], rel=1e-5), step
        assert got[step]["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4), step


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["deepspeed", "torchrun"])
def test_a_cut_cable_ends_all_ranks_and_launchers_with_a_message(hosts, tmp_path, text_file, kind):
    changes = [*text(text_file), "train.steps=100000", f"parallel.timeout_s={TIMEOUT_S}"]
    with Job(kind, hosts, tmp_path, 2, *changes) as job:
        job.until(lambda: job.trained(5), 300)
        hosts[1].cut()
        seconds = job.until(lambda: not job.ranks(), 100)
        print(f"cut, {kind}: ranks {seconds:.1f} s")
        assert seconds < TIMEOUT_S + 3, job.report()
        seconds = job.until(lambda: not job.family(), 100)
        assert seconds < 10, job.report()
    here, there = job.lines(0), job.lines(1)
    assert (list(here), list(there)) == ([0, 1], [2, 3]), job.report()
    keeper = "rank 0 (host-a)" if kind == "deepspeed" else "the launcher"
    for rank, line in here.items():
        assert f"rank {rank} (host-a) ends with exit code 75: ranks 2, 3 (host-b) gave no sign of life" in line
    for rank, line in there.items():
        assert f"rank {rank} (host-b) ends with exit code 75: {keeper}, which keeps" in line
        assert "host-a:" in line


def test_a_rank_killed_on_another_host_is_named_long_before_the_timeout(hosts, tmp_path, text_file):
    changes = [*text(text_file), "train.steps=100000", "parallel.timeout_s=120"]
    with Job("deepspeed", hosts, tmp_path, 1, *changes) as job:
        job.until(lambda: job.trained(5), 300)
        [victim] = [process for process in job.ranks() if process.environ()["RANK"] == "1"]
        victim.kill()
        seconds = job.until(lambda: not job.family(), 100)
        print(f"killed: all {seconds:.1f} s")
        assert seconds < 40, job.report()
    assert "rank 0 (host-a) ends with exit code 75: rank 1 (host-b) gave no sign of life" in job.lines(0)[0]
