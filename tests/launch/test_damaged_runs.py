"""Commands on damaged run folders: never another checkpoint's figures, text or weights than the output names."""

import contextlib
import io
import json
import random
import shutil
from pathlib import Path

import damage
import pytest
from commands import exit_code
from safetensors.torch import load_file

from launch import checkpoint, evaluate, generate
from launch.pretrain import main as pretrain
from mega_scale import export
from mega_scale.checkpoint.state import StateReader

OLDER, NEWER = "step-00000003", "step-00000006"
DAMAGES = 100
TINY = [
    "model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=24", "model.nffn_hidden_size=20",
    "model.shared_representation_size=8", "model.ema_projection_size=2", "model.chunk_size=16",
    "data.source=json", "data.sequence_length=32", "train.global_batch_size=2", "train.micro_batch_size=2",
    "train.eval_every=0", "train.eval_batches=1", "train.sample_every=0", "train.tensorboard=false",
    "schedule.warmup_steps=0", "data.validation_fraction=0.5", "checkpoint.every=3", "checkpoint.keep=0",
    "optimizer.lr=0.05", "parallel.engine=fsdp", "parallel.self_test=false", "train.steps=6",
]  # fmt: skip


def run(command, *arguments):
    """Exit code, standard output, and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = exit_code(command.main, *arguments)
    return code, out.getvalue(), err.getvalue()


def evaluated(path, text):
    code, out, _ = run(evaluate, path, text, "--sequence-length", 32, "--json", "--device", "cpu")
    found = json.loads(out) if code == 0 else {}
    return code, found.get("model"), found.get("loss")


def generated(path, text):
    code, out, err = run(generate, path, "--max-new-tokens", 10, "--device", "cpu")
    return code, err.rpartition("text by ")[2].strip(), out


def _beside(path):
    """The folder that holds the run of a path."""
    return path.parents[2] if path.parent.name == "checkpoints" else path.parent


def exported(path, text, *more):
    out_dir = _beside(path) / "exported"
    shutil.rmtree(out_dir, ignore_errors=True)
    code, out, _ = run(export, path, out_dir, *more)
    name = out.removeprefix("exported ").partition(" to ")[0]
    return code, name, load_file(out_dir / "model.safetensors")["lm_head.bias"].tolist() if code == 0 else None


def converted(path, text, *more):
    out_dir = _beside(path) / "converted"
    shutil.rmtree(out_dir, ignore_errors=True)
    code, out, _ = run(checkpoint, "convert", path, out_dir, *more)
    written = out.removeprefix("wrote ").strip()
    return (
        code,
        written,
        StateReader(Path(written) / "state").whole("lm_head.bias", "exp_avg").tolist() if code == 0 else None,
    )


COMMANDS = {
    "evaluate": evaluated,
    "generate": generated,
    "export": exported,
    "convert": converted,
    "export --allow-older": lambda path, text: exported(path, text, "--allow-older"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with two checkpoints, a text, and what every command makes of each checkpoint."""
    folder = tmp_path_factory.mktemp("damaged")
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"document {n} to train on and validate on"}) for n in range(200)))
    pretrain([*TINY, f"data.path={text}", f"run_dir={folder / 'run'}"])
    truth = {}
    for name in (OLDER, NEWER):
        for command, act in COMMANDS.items():
            code, named, made = act(folder / "run" / "checkpoints" / name, text)
            assert code == 0 and Path(named).name == name
            truth[command, name] = made
    assert all(truth[command, OLDER] != truth[command, NEWER] for command in COMMANDS)
    return folder, text, truth


@pytest.fixture
def run_dir(trained, tmp_path):
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    return tmp_path / "run"


def hurt(run_dir, draw):
    """One damage, of any kind, to any file or folder of the newest checkpoint or beside it; returns what was done."""
    newer, older = (run_dir / "checkpoints" / name for name in (NEWER, OLDER))
    kinds = [
        *damage.OF_ONE_FILE,
        *damage.OF_ONE_FILE,
        "link",
        "folder",
        "manifest",
        "pointer",
        "stale",
        *damage.FOLDERS,
    ]
    kind, name = draw.choice([*kinds, "swap", "older file", "extra"]), draw.choice(damage.files(newer))
    if kind in damage.OF_ONE_FILE:
        damage.OF_ONE_FILE[kind](newer / name, draw)
    elif kind in damage.FOLDERS:
        damage.FOLDERS[kind](newer, older)
    elif kind == "link":
        damage.link(newer / name, draw)
    elif kind == "folder":
        damage.make_folder(newer / name, draw)
    elif kind == "manifest":
        damage.edit_manifest(newer / "manifest.json", draw)
    elif kind == "pointer":
        damage.damage_pointer(newer.parent / "latest", draw)
    elif kind == "stale":
        (newer.parent / "latest").write_bytes(damage.STALE)
    elif kind == "swap":
        damage.two_swapped(newer, name, draw)
    elif kind == "older file":
        damage.of_older(newer, name, older)
    else:
        damage.extra(newer, name, draw)
    return f"{kind} of {name}"


@pytest.mark.slow
def test_a_hundred_random_damages_never_give_another_checkpoint_than_named(trained, tmp_path):
    folder, text, truth = trained
    draw, taken = random.Random(0), []
    for number in range(DAMAGES):
        run_dir = tmp_path / str(number) / "run"
        shutil.copytree(folder / "run", run_dir)
        done = [hurt(run_dir, draw)]
        if draw.random() < 0.2 and (run_dir / "checkpoints" / NEWER).is_dir() and "manifest" not in done[0]:
            (run_dir / "checkpoints" / "latest").unlink(missing_ok=True)  # so that nothing tells of it
            done.append("no pointer")
        command = list(COMMANDS)[number % len(COMMANDS)]
        code, named, made = COMMANDS[command](run_dir, text)
        if code == 0:
            taken.append(Path(named).name)
            assert made == truth[command, taken[-1]], (number, command, done)
            assert taken[-1] == NEWER or command not in ("export", "convert"), (number, command, done)
        else:
            assert code == 2, (number, command, done)
        shutil.rmtree(run_dir.parent)
    assert taken.count(OLDER) > 15 and taken.count(NEWER) > 10 and len(taken) < DAMAGES - 10


@pytest.mark.parametrize("name", ["trainer.json", "model/tokenizer.json", "state/part-00000.safetensors", "latest"])
def test_an_older_checkpoint_is_taken_only_with_a_line_that_says_why(trained, run_dir, name):
    _, text, truth = trained
    newer, older = (run_dir / "checkpoints" / step for step in (NEWER, OLDER))
    if name == "latest":  # names a checkpoint that is gone
        shutil.rmtree(newer)
    else:
        (newer / name).unlink()
    code, out, err = run(evaluate, run_dir, text, "--sequence-length", 32, "--device", "cpu")
    assert code == 0 and str(older) in out and str(newer) not in out
    assert err.count("\n") == 1 and f"{older} is taken" in err and name in err and NEWER in err
    assert generated(run_dir, text) == (0, str(older), truth["generate", OLDER])
    for act in (exported, converted):
        assert act(run_dir, text)[0] == 2
        code, named, _ = act(run_dir, text, "--allow-older")
        assert code == 0 and Path(named).name == OLDER
        assert act(older, text)[0] == 0
    code, _, err = run(export, run_dir, run_dir.parent / "out")
    assert code == 2 and err.count("\n") == 1 and NEWER in err and "--allow-older" in err
    assert not (run_dir.parent / "out").exists()


def test_verify_names_strays(run_dir):
    folder = run_dir / "checkpoints" / NEWER
    (folder / ".nfs0001").write_text("")
    (folder / "model" / "notes.txt").write_text("")
    (run_dir / "checkpoints" / ".DS_Store").write_text("")
    code, out, _ = run(checkpoint, "verify", run_dir)
    assert code == 0 and out.count("valid   ") == 2 and out.count("stray   ") == 3
    assert all(name in out for name in ("'.nfs0001'", "'model/notes.txt'", "'.DS_Store'"))


def test_a_tokenizer_file_that_is_none_of_the_checkpoint_is_not_loaded(trained, run_dir):
    _, text, truth = trained
    model = run_dir / "checkpoints" / NEWER / "model"
    (model / "added_tokens.json").write_text(json.dumps({"text": 3}))
    (model / "special_tokens_map.json").write_text(json.dumps({"eos_token": "d"}))
    (model / "chat_template.jinja").write_text("{{ 1 }}")
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/none"}))
    code, named, made = exported(run_dir, text)
    assert (code, made) == (0, truth["export", NEWER]) and Path(named).name == NEWER
    assert not (run_dir.parent / "exported" / "chat_template.jinja").exists()
    assert evaluated(run_dir, text)[2] == truth["evaluate", NEWER]
