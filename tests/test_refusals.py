"""What cannot run is refused in one line that names key, value and remedy: one table, run in one process.

That launchers pass on the exit code, and that no rank is left behind, is in tests/launch/test_refused_runs.py.
"""

import shlex

import pytest

from launch.pretrain import main
from mega_scale.parallel import World

TINY = [
    "data.sequence_length=64", "model.chunk_size=16", "train.global_batch_size=8", "train.micro_batch_size=2",
    "train.steps=10", "train.eval_every=0", "train.sample_every=0", "schedule.warmup_steps=0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch):
    """The first of two ranks, which never meet."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(World, "start", lambda *_: pytest.fail("the ranks were to meet: nothing was refused"))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with what the table names."""
    folder = tmp_path_factory.mktemp("places")
    for name in ("blocked", "file", "empty.txt"):
        (folder / name).touch()
    (folder / "short.txt").write_text("a few words")
    (folder / "text.jsonl").write_text('{"text": "some words"}\n' * 200)
    for name in ("saved", "unmounted"):
        (folder / name).mkdir()
    (folder / "saved/checkpoints").touch()
    (folder / "unmounted/checkpoints").symlink_to(folder / "gone")
    return folder


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    output, error = capsys.readouterr()
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, (output, error)
    return error


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        # Words, keys and types
        ("train.stepz=5", ["train.stepz is not a key", "train.steps"]),
        ("steps=5", ["steps is not a key", "train.steps"]),
        ("--optim.lr 1e-3", ["optim.lr is not a key", "optimizer.lr"]),
        ("model.dropout=0", ["model.dropout is not a key", "model.dropout_prob"]),
        ("--train.stepz", ["train.stepz is not a key", "train.steps"]),
        ("train.steps=many", ["train.steps='many'", "an integer"]),
        ("train.steps=1.5", ["train.steps='1.5'", "an integer"]),
        ("train.steps=null", ["train.steps=null", "an integer"]),
        ("train.steps=", ["train.steps=''", "an integer"]),
        ("--train.steps", ["train.steps has no value", "train.steps=VALUE"]),
        ("optimizer.lr=fast", ["optimizer.lr='fast'", "a number"]),
        ("train.tensorboard=3", ["train.tensorboard='3'", "true or false"]),
        ("profile.steps=[4]", ["profile.steps=[4]", "[10, 14]"]),
        ("profile.steps=[5,4]", ["profile.steps=[5, 4]", "[10, 14]"]),
        ("train.steps=20 profile.steps=[19,21]", ["profile.steps=[19, 21]", "train.steps=20"]),
        ("profile.ranks=[99]", ["profile.ranks=[99]", "ranks, 0 to"]),
        ("train.dtype=fp8", ["train.dtype='fp8'", "one of fp32, bf16"]),
        ("parallel.engine=megatron", ["parallel.engine='megatron'", "fsdp, deepspeed"]),
        ("model.truncation=some", ["model.truncation='some'", "an integer or null"]),
        ("model.eos_token_id=end", ["model.eos_token_id='end'", "an integer or a list of integer items or null"]),
        ("train={steps:3}", ["train={steps:3}", "section", "train.KEY=VALUE"]),
        ("parallel.ds_config.a=1 parallel.ds_config.a.b=2", ["parallel.ds_config.a.b=2", "already holds"]),
        ("parallel.ds_config.a=[", ["parallel.ds_config.a=[", "not YAML"]),
        ("nonsense", ["'nonsense'", "KEY=VALUE"]),
        ("-v", ["'-v'", "KEY=VALUE"]),
        ("--config no/such.yaml", ["no/such.yaml", "no such file"]),
        ("--config", ["config has no value"]),
        # Values and combinations
        (
            "train.global_batch_size=30 train.micro_batch_size=8",
            ["train.global_batch_size=30", "2 data-parallel ranks", "train.micro_batch_size=8", "16 or 32", "3 or 5"],
        ),
        ("train.global_batch_size=7 train.micro_batch_size=8", ["train.global_batch_size=7", "of 16"]),
        ("model.use_chunking=true model.chunk_size=100", ["model.chunk_size=100", "sequence_length=512", "500 or 600"]),
        ("model.use_chunking=true model.chunk_size=-1", ["model.use_chunking=True", "chunk_size=-1"]),
        ("model.bidirectional=true", ["model.is_decoder=True", "bidirectional=True", "set bidirectional=False"]),
        ("model.is_decoder=false", ["model.is_decoder=False", "set it to true"]),
        ("model.add_cross_attention=true", ["model.add_cross_attention=True", "set it to false"]),
        ("model.shared_representation_size=33", ["shared_representation_size=33", "even"]),
        ("model.normalization_type=batchnorm", ["model.normalization_type='batchnorm'", "layernorm"]),
        ("model.activation=tanh", ["model.activation='tanh'", "silu"]),
        ("model.dropout_prob=1.5", ["model.dropout_prob=1.5"]),
        ("model.hidden_size=0", ["model.hidden_size=0", "at least 1"]),
        (
            "model.relative_positional_bias=simple model.use_chunking=false model.max_positions=256",
            ["data.sequence_length=512", "model.max_positions=256", "rotary"],
        ),
        ("model.truncation=8 train.sample_every=5", ["model.truncation=8", "train.sample_every=5", "sample_every=0"]),
        ("schedule.warmup_steps=50 train.steps=40", ["schedule.warmup_steps=50", "train.steps=40", "at most 40"]),
        ("schedule.min_lr=1", ["schedule.min_lr=1.0", "optimizer.lr="]),
        ("schedule.warmup_init_lr=1", ["schedule.warmup_init_lr=1.0", "optimizer.lr="]),
        ("train.steps=0", ["train.steps=0", "above 0"]),
        ("train.micro_batch_size=-1", ["train.micro_batch_size=-1", "above 0"]),
        ("train.eval_batches=-1", ["train.eval_batches=-1", "0 or above"]),
        ("train.sample_tokens=0", ["train.sample_tokens=0", "above 0"]),
        ("data.sequence_length=0", ["data.sequence_length=0"]),
        ("optimizer.lr=-0.1", ["optimizer.lr=-0.1", "above 0"]),
        ("optimizer.lr=.inf", ["optimizer.lr=inf"]),
        ("optimizer.beta2=1", ["optimizer.beta2=1.0", "below 1"]),
        ("optimizer.max_grad_norm=-1", ["optimizer.max_grad_norm=-1.0", "0 or above"]),
        ("checkpoint.every=-5", ["checkpoint.every=-5", "0 or above"]),
        ("parallel.zero_stage=4", ["parallel.zero_stage=4", "0, 1, 2 or 3"]),
        ("parallel.engine=fsdp parallel.ds_config.a=1", ["parallel.ds_config={'a': 1}", "deepspeed"]),
        ("parallel.engine=deepspeed parallel.ds_config.bf16.enabled=true", ["bf16.enabled", "train.dtype"]),
        ("data.validation_fraction=0 train.eval_every=5", ["data.validation_fraction=0", "train.eval_every=5"]),
        ("run_dir={tmp}/blocked", ["run_dir=", "blocked", "can be written"]),
        ("run_dir={tmp}/blocked/inside", ["run_dir=", "inside", "can be written"]),
        ("--resume", ["resume='latest'", "{tmp}/run", "checkpoint"]),
        ("--resume {tmp}/none", ["resume='{tmp}/none'", "checkpoint", "step-"]),
        ("--resume=3", ["resume='3'", "neither a checkpoint", "step-"]),
        ("init_from={tmp}/none", ["init_from=", "none", "config.json", "launch/export.py"]),
        ("checkpoint.key_file={tmp}/none", ["checkpoint.key_file='{tmp}/none'", "a readable file"]),
        ("run_dir={tmp}/file", ["run_dir=", "file", "can be written"]),
        ("run_dir={tmp}/saved", ["run_dir='{tmp}/saved'", "{tmp}/saved/checkpoints", "move it away"]),
        ("run_dir={tmp}/unmounted", ["run_dir='{tmp}/unmounted'", "{tmp}/unmounted/checkpoints", "move it away"]),
    ],
)
def test_the_default_run_with_a_change_is_refused(words, fragments, places, capsys):
    arguments = [f"run_dir={places}/run", *(word.replace("{tmp}", str(places)) for word in shlex.split(words))]
    message = refusal(arguments, capsys)
    assert all(fragment.replace("{tmp}", str(places)) in message for fragment in fragments), message


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("data.source=text data.path=/nowhere/*.txt", ["data.path", "/nowhere/*.txt"]),
        ("data.source=json", ["data.path", "files"]),
        ("data.source=json data.path={tmp}/text.jsonl data.text_column=body", ["body", "text"]),
        ("data.source=text data.path={tmp}/empty.txt", ["1 of 1 rows", "empty.txt, line 1", "data.max_bad_share"]),
        ("data.source=text data.path={tmp}/short.txt data.validation_fraction=0", ["tokens", "row"]),
        ("train.global_batch_size=9", ["train.global_batch_size=9", "8 or 12"]),
        ("data.sequence_length=70", ["model.chunk_size=16", "data.sequence_length=70", "64"]),
        (
            "'data.length_schedule=[[0, 8], [5, 64]]'",
            ["data.length_schedule=[[0, 8], [5, 64]]", "model.chunk_size=16", "use 16"],
        ),
        ("'data.length_schedule=[[0, 48]]'", ["48", "data.sequence_length=64", "16, 32"]),
        ("data.packing_order=best_fit", ["data.packing_order='best_fit'", "packing=reset"]),
        (
            "data.packing=reset model.truncation=8",
            ["data.packing='reset'", "model.truncation=8", "model.truncation=null"],
        ),
        ("parallel.ds_config.gradient_clipping=3", ["gradient_clipping", "optimizer.max_grad_norm"]),
        ("parallel.tp=4", ["parallel.tp=4", "use parallel.tp=1 or 2", "start 4 processes"]),
        ("parallel.sp=0", ["parallel.sp=0", "parallel.sp=1"]),
        ("parallel.ds_config.tensor_parallel.autotp_size=2", ["ds_config.tensor_parallel", "contradicts parallel.tp"]),
        ("train.fp8=true parallel.engine=deepspeed", ["train.fp8=True", "parallel.engine=deepspeed", "engine=fsdp"]),
        ("train.fp8=true parallel.engine=fsdp parallel.tp=2", ["train.fp8=True", "parallel.tp=2", "parallel.tp=1"]),
        ("train.fp8=true parallel.engine=fsdp", ["train.fp8=True", "train.dtype=fp32", "train.dtype=bf16"]),
        (
            "train.fp8=true parallel.engine=fsdp train.dtype=bf16 parallel.device=cpu",
            ["train.fp8=True", "a CPU", "train.fp8=false"],
        ),
        (
            "parallel.tp_overlap=true parallel.engine=fsdp",
            ["parallel.tp_overlap=True", "parallel.tp=1", "tp=2 or more"],
        ),
        (
            "parallel.tp_overlap=true parallel.tp=2 parallel.engine=deepspeed",
            ["parallel.tp_overlap=True", "parallel.engine=deepspeed", "use parallel.engine=fsdp"],
        ),
        (
            "parallel.tp_overlap=true parallel.tp=2 parallel.engine=fsdp parallel.device=cpu",
            ["parallel.tp_overlap=True", "NVIDIA GPUs", "remove parallel.tp_overlap"],
        ),
        ("parallel.device=cuda", ["parallel.device", "cuda", "cpu"]),
        ("run_dir={tmp}/file/run", ["run_dir", "folder"]),
        ("--resume {tmp}", ["resume", "manifest.json"]),
        ("data.tokenizer=./no-such-folder", ["data.tokenizer", "no-such-folder"]),
        ("model.vocab_size=100", ["model.vocab_size=100", "259"]),
    ],
)
def test_a_small_run_with_a_change_is_refused(words, fragments, places, capsys):
    arguments = [*TINY, f"run_dir={places}/run", *(word.replace("{tmp}", str(places)) for word in shlex.split(words))]
    message = refusal(arguments, capsys)
    assert all(fragment in message for fragment in fragments), message
