"""Files that were written to do harm: none of their code runs, whether the manifest was left, forged, or is signed."""

import contextlib
import shutil
import sys
from pathlib import Path

import damage
import payloads
import pytest
import verified_run

from mega_scale.checkpoint.folder import (
    MANIFEST,
    CheckpointError,
    Manifest,
    find_checkpoint,
    read_state,
    write_manifest,
)
from mega_scale.checkpoint.state import load_checkpoint
from mega_scale.config import load_config
from mega_scale.files import Record, hash_file
from mega_scale.parallel import ParallelConfig, World
from mega_scale.training import trained_model

KEY = b"a secret of twenty-four "
WATCHED = {"pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"}
_seen: list[str] | None = None


def _hook(event, arguments):
    if _seen is not None and event in WATCHED:
        _seen.append(f"{event} {arguments}"[:200])


sys.addaudithook(_hook)


@contextlib.contextmanager
def nothing_runs(marker: Path, folder: Path):
    """Fails if something is unpickled or started meanwhile, if the marker appears, or the folder's code is imported."""
    global _seen  # noqa: PLW0603  an audit hook can be told in no other way
    _seen = []
    try:
        yield
        assert not _seen, _seen
    finally:
        _seen = None
    assert not marker.exists()
    assert "evil" not in {name.rpartition(".")[2] for name in sys.modules}
    assert not (folder.parents[2] / "escaped").exists()


@pytest.fixture(scope="module")
def world():
    with World.start(ParallelConfig(device="cpu")) as found:
        yield found


@pytest.fixture(scope="module")
def ours(world, tmp_path_factory):
    return verified_run.Ours(tmp_path_factory.mktemp("plain"), world)


@pytest.fixture(scope="module")
def signed(world, tmp_path_factory):
    return verified_run.Ours(tmp_path_factory.mktemp("signed"), world, KEY)


def newest(run: Path) -> Path:
    return run / "checkpoints" / f"step-{verified_run.NEWER:08d}"


def seal(folder: Path, key: bytes | None = None) -> None:
    """Write a manifest that fits whatever lies in the folder, as an attacker can who has no secret."""
    records = {name: hash_file(folder / name, key) for name in damage.files(folder) if name != MANIFEST}
    write_manifest(folder, Manifest(verified_run.NEWER, 2, records), key)


def use(ours, folder: Path, file: str) -> list[str]:
    """All that is ever done with a file of a checkpoint; returns what was refused."""

    def go_on():
        ours.forget()
        try:
            load_checkpoint(find_checkpoint(folder, ours.key, world=ours.world)[0], ours.engine, ours.world)
        except ValueError:
            assert ours.unchanged(), "changed, and then refused"
            raise

    readers = [go_on, lambda: read_state(folder)]
    if file.startswith(("model/", "state/")):
        readers.append(lambda: dict(trained_model.open_model(folder, ours.key)[1]))
    if file == "config.yaml":
        readers.append(lambda: load_config(folder / file))
    refused = []
    for read in readers:
        try:
            read()
        except ValueError as error:
            refused.append(str(error))
    return refused


@contextlib.contextmanager
def poisoned(ours, name: str, content: bytes):
    """A copy of the run with one file replaced; the file before comes back at the end."""
    path = newest(ours.target) / name
    before, manifest = path.read_bytes(), (path := newest(ours.target)) / MANIFEST
    kept = manifest.read_bytes()
    (newest(ours.target) / name).write_bytes(content)
    try:
        yield newest(ours.target)
    finally:
        (newest(ours.target) / name).write_bytes(before)
        manifest.write_bytes(kept)


@pytest.fixture(autouse=True)
def _copies(ours, signed):
    ours.target, signed.target = ours.copy(), signed.copy()


def test_there_are_enough_of_them():
    assert len(payloads.ANYWHERE) >= 20 and len(payloads.AIMED) >= 15


def test_payloads_do_run_where_they_are_loaded_without_care(tmp_path):
    """Otherwise the tests below would show nothing."""
    import pickle  # noqa: PLC0415

    import torch  # noqa: PLC0415
    import yaml  # noqa: PLC0415

    marker = tmp_path / "marker"
    for name, make in payloads.ANYWHERE.items():
        content = make(marker)
        if name.startswith("pickle"):
            pickle.loads(content)  # noqa: S301
        elif name.startswith("torch.save"):
            (tmp_path / "file").write_bytes(content)
            torch.load(tmp_path / "file", weights_only=False)
        elif name == "YAML, call":
            yaml.unsafe_load(content)
        else:
            continue
        assert marker.exists(), name
        marker.unlink()


@pytest.mark.parametrize("name", payloads.ANYWHERE)
def test_behind_an_untouched_manifest_nothing_is_even_parsed(ours, tmp_path, monkeypatch, name):
    def parsed(*args, **kwargs):
        raise AssertionError("parsed before it was verified")

    marker = tmp_path / "marker"
    content = payloads.ANYWHERE[name](marker)
    ours.forget()
    for file in damage.files(newest(ours.target)):
        with poisoned(ours, file, content) as folder, monkeypatch.context() as patched:
            for reader in ("AutoTokenizer.from_pretrained", "MegaConfig.from_pretrained"):
                patched.setattr(f"mega_scale.training.trained_model.{reader}", parsed)
            patched.setattr("mega_scale.checkpoint.state.open_weights", parsed)
            with nothing_runs(marker, folder):
                for act in (lambda f: find_checkpoint(f, world=ours.world), trained_model.open_model):
                    with pytest.raises(CheckpointError, match="is no valid checkpoint"):
                        act(folder)
                found, lines = find_checkpoint(ours.target, world=ours.world)
                assert found.name == "step-00000003"
            assert file in lines[0] and ours.unchanged()


@pytest.mark.parametrize("name", payloads.ANYWHERE)
def test_behind_a_forged_manifest_nothing_runs_and_only_values_are_refused(ours, tmp_path, name):
    marker = tmp_path / "marker"
    content = payloads.ANYWHERE[name](marker)
    for file in damage.files(newest(ours.target)):
        if file == MANIFEST:
            continue
        with poisoned(ours, file, content) as folder:
            (folder / "model" / "evil.py").write_text(payloads.evil_module(marker))
            seal(folder)
            with nothing_runs(marker, folder):
                refused = use(ours, folder, file)
            # Configuration and tokenizer may say anything that is no code; what training goes on from may not.
            assert refused or file.startswith(("model/", "config.yaml")), file
            (folder / "model" / "evil.py").unlink()


@pytest.mark.parametrize("name", payloads.AIMED)
def test_what_is_right_but_for_one_thing_is_refused_or_harmless(ours, tmp_path, name):
    marker = tmp_path / "marker"
    file, change = payloads.AIMED[name]
    with poisoned(ours, file, change((newest(ours.target) / file).read_bytes())) as folder:
        (folder / "model" / "evil.py").write_text(payloads.evil_module(marker))
        seal(folder)
        with nothing_runs(marker, folder):
            use(ours, folder, file)


@pytest.mark.slow
@pytest.mark.parametrize("name", payloads.ANYWHERE)
def test_with_a_key_a_forged_manifest_is_refused(signed, tmp_path, name):
    marker = tmp_path / "marker"
    content = payloads.ANYWHERE[name](marker)
    for key in (None, b"the attacker's own secret"):
        for file in damage.files(newest(signed.target)):
            if file == MANIFEST:
                continue
            with poisoned(signed, file, content) as folder:
                seal(folder, key)
                signed.forget()
                with nothing_runs(marker, folder):
                    with pytest.raises(CheckpointError, match=r"not signed with a secret|signed with another secret"):
                        find_checkpoint(folder, KEY, world=signed.world)
                    with pytest.raises(CheckpointError, match=r"not signed with a secret|signed with another secret"):
                        trained_model.open_model(folder, KEY)
                assert signed.unchanged()


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "state/../../outside", "", ".", "..", "state", "a\0b", "x" * 5000, "é\ud800"]
)
def test_a_manifest_that_names_files_elsewhere_is_refused(ours, name):
    folder = newest(ours.target)
    (folder.parent / "outside").write_text("x")
    records = {n: hash_file(folder / n, None) for n in damage.files(folder) if n != MANIFEST}
    try:
        write_manifest(folder, Manifest(6, 2, {**records, name: Record(1, "0" * 32)}), None)
    except UnicodeEncodeError:
        pytest.skip("half a surrogate is no UTF-8: such a manifest cannot be written in the first place")
    for act in (lambda: find_checkpoint(folder, world=ours.world), lambda: trained_model.open_model(folder)):
        with pytest.raises(CheckpointError):
            act()


def test_a_checkpoint_that_links_out_of_itself_is_refused_even_with_a_fitting_manifest(ours, tmp_path):
    folder = newest(ours.target)
    part = folder / "state" / "part-00000.safetensors"
    shutil.copyfile(part, tmp_path / "elsewhere")
    part.unlink()
    part.symlink_to(tmp_path / "elsewhere")
    seal(folder)
    with pytest.raises(CheckpointError, match="no regular file"):
        find_checkpoint(folder, world=ours.world)


@pytest.mark.parametrize(
    "content", [{}, {"cpu": (5056, 7)}, {"cpu": (10, 0)}, {"cpu": (0, 0)}, {"cuda": (16, 0)}], ids=str
)
def test_a_random_state_that_is_none_is_refused_before_anything_changes(ours, content):
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    folder = newest(ours.target)
    tensors = {name: torch.full((size,), value, dtype=torch.uint8) for name, (size, value) in content.items()}
    save_file(tensors, folder / "random" / "rank-00000.safetensors")
    seal(folder)
    ours.forget()
    with pytest.raises(ValueError, match="holds no random state"):
        load_checkpoint(find_checkpoint(folder, world=ours.world)[0], ours.engine, ours.world)
    assert ours.unchanged()


@pytest.mark.parametrize("change", ["dtype", "shape", "moment", "buffer"])
def test_other_tensors_than_the_index_says_are_refused_before_anything_changes(ours, change):
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    folder = newest(ours.target)
    part = folder / "state" / "part-00000.safetensors"
    tensors = load_file(part)
    last = max(name for name in tensors if name.startswith("weight/"))
    if change == "dtype":
        tensors[last] = tensors[last].to(torch.float64)
    elif change == "shape":
        tensors[last] = tensors[last][:-1].clone()
    elif change == "moment":
        del tensors[last.replace("weight/", "exp_avg_sq/")]
    else:
        buffers = [name for name in tensors if name.startswith("buffer/")]
        if not buffers:
            pytest.skip("this model has no buffers, so there is none to give another shape")
        tensors[buffers[0]] = torch.zeros(3)
    save_file(tensors, part)
    seal(folder)
    ours.forget()
    with pytest.raises(ValueError, match=r"choose another checkpoint|another model"):
        load_checkpoint(find_checkpoint(folder, world=ours.world)[0], ours.engine, ours.world)
    assert ours.unchanged()
