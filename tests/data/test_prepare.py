"""Prepared data is the same to the byte however it was made, is whole or refused, and trains like the text itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mega_scale.data import DataConfig, load_datasets, load_tokenizer
from mega_scale.data.prepare import Preparation, run, run_on_cluster
from mega_scale.data.sources import stdlib_documents
from mega_scale.data.tokens import check_content, open_part, read_manifest
from mega_scale.files import FileLock

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {i}: ünïcode 😀 {'x' * (i * 7 % 50)}" for i in range(300)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(3):
        lines = [json.dumps({"text": text}) for text in TEXTS[100 * i : 100 * i + 100]]
        (folder / f"{i}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config_of(corpus: Path, **keys) -> DataConfig:
    keys = {"validation_fraction": 0.2, "sequence_length": 16} | keys
    return DataConfig(source="json", path=[str(corpus / "*.jsonl")], cache_dir=str(corpus / "cache"), **keys)


def opened(folder: Path, config: DataConfig, shard_bytes: int = 3000) -> Preparation:
    return Preparation(folder, config, load_tokenizer(config.tokenizer), shard_bytes=shard_bytes)


def prepare(folder: Path, config: DataConfig, processes: int = 1, shard_bytes: int = 3000) -> Preparation:
    preparation = opened(folder, config, shard_bytes)
    for _ in run(preparation, processes):
        pass
    preparation.finish()
    return preparation


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "whole"
    assert len(prepare(folder, config_of(corpus)).shards) > 5
    return folder


def test_files_do_not_depend_on_processes_or_interruptions(corpus, whole, tmp_path):
    expected = contents(whole)
    assert not [name for name in expected if "unfinished" in name]
    prepare(tmp_path / "two", config_of(corpus), processes=2)
    assert contents(tmp_path / "two") == expected
    # As a killed process leaves it: some shards done, one half written, one written without its record.
    halves = tmp_path / "halves"
    first = Preparation(halves, config_of(corpus), load_tokenizer("byte"), shard_bytes=3000)
    for number in (0, 2, 3):
        first.make(number)
    (halves / "00003.json").unlink()
    (halves / "train-00001.tokens.unfinished-77").write_bytes(b"half")
    assert not (halves / "manifest.json").exists()
    with pytest.raises(ValueError, match="are missing"):
        first.finish()
    prepare(halves, config_of(corpus), processes=2)
    assert contents(halves) == expected


@pytest.mark.slow
@pytest.mark.launch
def test_killed_command_goes_on_and_gives_the_same_files(tmp_path):
    with (tmp_path / "text.jsonl").open("w") as file:
        for text in islice(stdlib_documents(), 300):
            file.write(json.dumps({"text": text}) + "\n")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"x": 0, "</s>": 1}, unk_token="x")), eos_token="</s>"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, str(ROOT / "launch/prepare.py"), "FOLDER", "--processes", "2", "--shard-mb", "1"]
    command += ["data.source=json", f"data.path={tmp_path / 'text.jsonl'}", f"data.tokenizer={tmp_path / 'tokenizer'}"]

    def start(name: str) -> subprocess.Popen:
        here = [str(tmp_path / name) if word == "FOLDER" else word for word in command]
        return subprocess.Popen(here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    killed = start("killed")
    while not list((tmp_path / "killed").glob("0*.json")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    family = [psutil.Process(killed.pid), *psutil.Process(killed.pid).children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed/manifest.json").exists()
    resumed = start("killed")
    output, errors = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, errors
    assert json.loads(output.splitlines()[0])["train"]["documents"] > 100
    config = DataConfig("json", [str(tmp_path / "text.jsonl")], tokenizer=str(tmp_path / "tokenizer"))
    prepare(tmp_path / "whole", config, shard_bytes=10**6)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("packing", ["concat", "none"])
def test_prepared_data_trains_like_the_text(packing, corpus, whole):
    tokenizer = load_tokenizer("byte")
    raw = load_datasets(config_of(corpus, packing=packing), tokenizer)
    keys = {"source": "prepared", "path": [str(whole)], "sequence_length": 16, "packing": packing}
    prepared = load_datasets(DataConfig(**keys), tokenizer)
    for one, other in zip(raw, prepared, strict=True):
        assert (one.tokens, one.bytes, len(one)) == (other.tokens, other.bytes, len(other))
        every = np.arange(len(one))
        np.testing.assert_array_equal(one.rows(every), other.rows(every))
        np.testing.assert_array_equal(one.document_starts(every), other.document_starts(every))
    # Limits keep the first documents, their bytes too.
    limited = DataConfig(**keys, max_documents=150, validation_documents=7)
    train, validation = load_datasets(limited, tokenizer)
    text = tokenizer.decode([t for row in validation.rows(np.arange(len(validation))) for t in row[1:] if t >= 0])
    assert validation.bytes == validation.tokens - 7 and text.count("</s>") == 7
    assert train.tokens - train.bytes == 150
    assert load_datasets(DataConfig(**keys, validation_fraction=0.0), tokenizer)[1] is None


def test_manifest_counts_what_is_there(whole):
    manifest = read_manifest(whole)
    assert manifest.tally.to_json() == {"rows": 300, "bad": {}, "last": ""}
    totals = [manifest.totals(part) for part in ("train", "validation")]
    assert sum(total["documents"] for total in totals) == 300
    assert sum(total["bytes"] for total in totals) == sum(len(text.encode()) for text in TEXTS)
    assert sum(total["tokens"] for total in totals) == sum(len(text.encode()) + 1 for text in TEXTS)
    assert (manifest.dtype, manifest.tokenizer_name) == ("<u2", "byte")


def test_wrong_tokenizer_is_refused_and_the_folder_has_the_right_one(whole, tmp_path):
    other = load_tokenizer("byte")
    other.add_tokens(["document"])
    other.save_pretrained(tmp_path)
    keys = {"source": "prepared", "path": [str(whole)], "sequence_length": 16}
    with pytest.raises(ValueError, match=r"data.tokenizer=.*is not the tokenizer.*data.tokenizer=.*tokenizer'"):
        load_datasets(DataConfig(**keys, tokenizer=str(tmp_path)), load_tokenizer(str(tmp_path)))
    carried = str(whole / "tokenizer")
    load_datasets(DataConfig(**keys, tokenizer=carried), load_tokenizer(carried))


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
@pytest.mark.parametrize("name", ["train-00003.tokens", "validation-00001.ends", "train-00000.text_ends"])
def test_damaged_file_is_found(damage, name, whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    assert len(list(check_content(folder))) == 2 * len(list(folder.glob("0*.json")))
    content = bytearray((folder / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    elif damage == "cut":
        (folder / name).write_bytes(content[:-1])
    else:
        (folder / name).unlink()
    with pytest.raises(ValueError, match=name):
        list(check_content(folder))
    if damage != "flip":  # seen without reading the file
        with pytest.raises(ValueError, match=name):
            open_part(folder, read_manifest(folder), name.split("-")[0])


def test_folder_of_something_else_is_refused(corpus, whole, tmp_path):
    with pytest.raises(ValueError, match="begun with other settings:"):
        prepare(whole, config_of(corpus, validation_fraction=0.1))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        prepare(tmp_path, config_of(corpus))
    with pytest.raises(ValueError, match=r"has no manifest.json"):
        read_manifest(tmp_path)
    for keys in ({"max_documents": 3}, {"validation_documents": 3}, {"streaming": True}, {"mixture": {}}):
        with pytest.raises(ValueError, match=f"data.{next(iter(keys))}="):
            prepare(tmp_path / "new", config_of(corpus, **keys))


def test_overwriting_makes_all_anew_and_respects_who_is_at_work(corpus, tmp_path):
    folder, other = tmp_path / "made", config_of(corpus, validation_fraction=0.0)
    first = prepare(folder, config_of(corpus))
    (folder / "notes.txt").write_text("mine")
    began = contents(folder)
    with pytest.raises(ValueError, match=r"other settings: .*--overwrite"):
        prepare(folder, other)

    def overwrite(config: DataConfig) -> Preparation:
        return Preparation(folder, config, load_tokenizer(config.tokenizer), shard_bytes=4000, overwrite=True)

    with FileLock(folder / "prepare.lock"), pytest.raises(ValueError, match="in use by another job"):
        overwrite(other)
    with pytest.raises(ValueError, match="lies in the folder"):
        overwrite(config_of(corpus, tokenizer=str(folder / "tokenizer")))
    assert contents(folder) == began
    second = overwrite(other)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "plan.json"]
    assert len(second.missing()) == len(second.shards)
    for late in (lambda: first.make(0), first.finish):  # a task of a cluster that still runs
        with pytest.raises(ValueError, match="overwritten by another job"):
            late()
    for _ in run(second, 1):
        pass
    second.finish()
    prepare(tmp_path / "whole", other, shard_bytes=4000)
    assert contents(folder) == contents(tmp_path / "whole") | {"notes.txt": b"mine"}


def test_validation_text_of_its_own_is_a_part(corpus, tmp_path):
    config = config_of(corpus, validation_path=[str(corpus / "2.jsonl")])
    config.path = [str(corpus / "[01].jsonl")]
    prepare(tmp_path / "made", config)
    manifest = read_manifest(tmp_path / "made")
    assert {part: manifest.totals(part)["documents"] for part in manifest.parts} == {"train": 200, "validation": 100}


SBATCH = """#!/bin/bash
# Runs the tasks of an array one after the other, and answers with the number of the job.
script="${@: -1}"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for ((i = 0; i <= ${last:-0}; i++)); do
    export SLURM_ARRAY_TASK_ID=$i SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_NODELIST=node0 SLURM_NODEID=0
    bash "$script" >> "$0.log" 2>&1
done
echo 7
"""


SRUN = """#!/bin/bash
shift 3  # -l -n 1
"$@"
"""


@pytest.fixture
def one_file(tmp_path) -> DataConfig:
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return DataConfig("json", [str(tmp_path / "text.jsonl")], validation_fraction=0.2)


@pytest.mark.distributed
def test_local_executor_makes_the_same_files(one_file, tmp_path):
    pytest.importorskip("datatrove", reason="needs datatrove, which pip install -e .[dev] brings")
    prepare(tmp_path / "own", one_file)
    run_on_cluster(opened(tmp_path / "local", one_file), tasks=3, processes=1, slurm={})
    assert contents(tmp_path / "local") == contents(tmp_path / "own")
    lost = tmp_path / "local/00002.json"
    lost.unlink()
    run_on_cluster(opened(tmp_path / "local", one_file), tasks=2, processes=1, slurm={})
    assert contents(tmp_path / "local") == contents(tmp_path / "own")


@pytest.mark.slow
@pytest.mark.distributed
def test_slurm_jobs_make_the_same_files(one_file, tmp_path, monkeypatch):
    pytest.importorskip("datatrove", reason="needs datatrove, which pip install -e .[dev] brings")
    prepare(tmp_path / "own", one_file)
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, script in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", "#!/bin/bash\necho node0\n")):
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    keys = {"partition": "cpu", "time": "00:10:00"}
    run_on_cluster(opened(tmp_path / "slurm", one_file), tasks=2, processes=None, slurm=keys)
    log = commands / "sbatch.log"
    assert (tmp_path / "slurm/manifest.json").exists(), log.read_text() if log.exists() else "nothing was submitted"
    assert contents(tmp_path / "slurm") == contents(tmp_path / "own")
    with pytest.raises(ValueError, match="partition and time"):
        run_on_cluster(opened(tmp_path / "slurm", one_file), tasks=2, processes=None, slurm={})
