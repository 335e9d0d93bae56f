"""launch/plan.py: what a run would be refused for is said in its line, and what does not fit ends with code 3."""

import json

import pytest
import torch.distributed as dist

from launch.plan import main
from launch.pretrain import main as pretrain
from mega_scale.config import parse
from mega_scale.model import MegaConfig
from mega_scale.parallel.devices import Device
from mega_scale.planner.times import Terms, crowding, memory_limit
from mega_scale.planner.trace import Cluster

SMALL = [
    "model.vocab_size=512", "model.hidden_size=64", "model.intermediate_size=128", "model.nffn_hidden_size=128",
    "model.shared_representation_size=32", "model.ema_projection_size=4", "model.num_hidden_layers=8",
    "model.chunk_size=64", "data.sequence_length=256", "train.global_batch_size=16", "train.micro_batch_size=1",
    "train.eval_every=0", "train.sample_every=0", "train.steps=1000", "schedule.warmup_steps=0",
    "parallel.engine=fsdp",
]  # fmt: skip
PLACE = ["--nodes", "2", "--gpus-per-node", "4"]
ZERO = "parallel.ds_config.zero_optimization"


@pytest.fixture(autouse=True)
def no_group_is_left():
    yield
    assert not dist.is_initialized()


# Plans that a run of 8 ranks on 2 hosts is refused for, before any of them starts.
REFUSED = [
    "parallel.tp=3",
    "parallel.sp=16",
    "parallel.dp_replicate=5",
    "parallel.dp_shard=4",
    "parallel.tp=8",  # across hosts
    "parallel.tp=4 model.hidden_size=66",
    "parallel.tp=4 model.intermediate_size=130",
    "parallel.tp=2 model.nffn_hidden_size=65",
    "parallel.sp=2 model.use_chunking=false",
    "parallel.sp=2 model.truncation=8",
    "parallel.sp=8 data.sequence_length=128",
    "data.sequence_length=100",
    "train.global_batch_size=12",
    "train.micro_batch_size=3",
    "parallel.sp=2 parallel.activation_checkpoint=1 parallel.activation_checkpoint_segment=128",
    "parallel.activation_checkpoint_segment=128",
    "parallel.zero_stage=0",
    "parallel.engine=deepspeed parallel.dp_replicate=2 parallel.zero_stage=2",
    f"parallel.engine=deepspeed parallel.dp_replicate=2 {ZERO}.offload_optimizer.device=cpu",
    "parallel.engine=deepspeed train.dtype=bf16 parallel.activation_checkpoint=1 "
    "parallel.activation_checkpoint_policy=save_matmuls",
    "parallel.tp=2 model.normalization_type=batchnorm",
    "schedule.warmup_steps=5000",
]


@pytest.mark.parametrize("words", REFUSED)
def test_a_plan_is_refused_in_the_line_of_the_run(words, tmp_path):
    arguments = [*SMALL, f"run_dir={tmp_path}/run", *words.split()]
    with pytest.raises(ValueError) as of_run:
        parse(arguments).validate(8, 4)
    with pytest.raises(ValueError) as of_plan:
        main([*PLACE, *arguments])
    assert str(of_plan.value) == str(of_run.value)


def test_nothing_is_made_on_the_disk(tmp_path, capsys):
    main(["--gpu", "cpu", "--nodes", "1", "--gpus-per-node", "2", *SMALL, f"run_dir={tmp_path}/run"])
    assert not (tmp_path / "run").exists()
    output = capsys.readouterr().out
    assert "total" in output and "time of a step" in output


def test_cores_do_one_thing_after_the_other_and_ranks_take_turns_on_them():
    cpu, gpu = Device.named("cpu"), Device.named("h100")
    terms = Terms(kernels=4.0, exposed=1.0, network=2.0, host=3.0)
    assert terms.together(gpu) == (5.0, "kernels") and terms.together(cpu) == (10.0, "kernels")
    assert [crowding(Cluster(1, ranks, cpu)) for ranks in (1, 2, 4)] == [1, 1, 2]
    assert crowding(Cluster(2, 8, gpu)) == 1 and memory_limit(Cluster(1, 4, cpu)) == cpu.capacity / 4


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("--gpu abacus", ["gpu='abacus' is unknown", "h100"]),
        ("--set kernal=1", ["gpu.kernal is unknown", "kernel"]),
        ("--set kernel", ["--set kernel is not possible", "NAME=VALUE"]),
        ("--set memory=-1", ["gpu.memory=-1"]),
        ("--rank 8", ["--rank=8", "0 to 7"]),
        ("--nodes 0", ["--nodes=0", "at least 1"]),
        ("parallel.device=cpu", ["parallel.device='cpu'", "--gpu cpu"]),
        ("--devices README.md", ["README.md is no"]),
        ("--gpu cpu parallel.device=cuda", ["parallel.device='cuda'", "CPUs are planned"]),
        ("model.hiden_size=3", ["model.hiden_size", "hidden_size"]),
        ("data.tokenizer=no/where model.vocab_size=null", ["data.tokenizer='no/where'", "model.vocab_size"]),
        ("init_from={tmp}/other", ["init_from", "no config.json"]),
        ("--resume {tmp}/other", ["resume='{tmp}/other'"]),
        ("--plot {tmp}/picture.txt", ["--plot", ".png"]),
    ],
)
def test_what_a_plan_itself_cannot_mean_is_refused(words, fragments, tmp_path, capsys):
    arguments = [*PLACE, *SMALL, *words.replace("{tmp}", str(tmp_path)).split()]
    try:
        with pytest.raises((ValueError, SystemExit)) as ended:
            main(arguments)
    finally:
        said = str(ended.value) + capsys.readouterr().err
    assert all(fragment.replace("{tmp}", str(tmp_path)) in said for fragment in fragments), said


def test_weights_of_another_model_are_refused(tmp_path, capsys):
    other = MegaConfig(vocab_size=512, hidden_size=128, is_decoder=True, bidirectional=False)
    other.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*PLACE, *SMALL, f"init_from={tmp_path}"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "model.hidden_size=64" in error and "128" in error


@pytest.mark.slow
def test_what_does_not_fit_ends_with_code_3(tmp_path, capsys):
    file = tmp_path / "plan.json"
    with pytest.raises(SystemExit) as ended:
        pretrain(["--rehearse", *PLACE, "--set", "capacity=1.0e+9", "--json", str(file), *SMALL])
    output, error = capsys.readouterr()
    assert ended.value.code == 3 and "does not fit" in error and "train.micro_batch_size" in error
    facts = json.loads(file.read_text())
    assert facts["fits"] is False and set(facts["ranks"]) == {"0", "7"}
    assert facts["figures"]["capacity"] == 1.0e9 and facts["ranks"]["0"]["time"]["seconds"] > 0
    assert all(word in output for word in ("weights", "moments", "outside", "fsdp", "allgather", "MFU", "checkpoint"))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_search_prints_layouts_and_keys_that_plan(tmp_path, capsys, optimizer):
    file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    words = [*SMALL, f"optimizer.name={optimizer}"]
    main([*PLACE, "--search", "--top", "2", "--json", str(file), *words])
    output = capsys.readouterr().out
    facts = json.loads(file.read_text())
    assert len(facts["layouts"]) == 2 and facts["fits"] and " ".join(facts["keys"]) in output
    steps = [float(row["step ms"].replace(",", "")) for row in facts["layouts"]]
    assert steps == sorted(steps)
    main([*PLACE, "--plot", str(picture), "--failures", *words, *facts["keys"]])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    output = capsys.readouterr().out
    assert "goodput" in output and ("alltoall_base" in output) is (optimizer == "muon")
