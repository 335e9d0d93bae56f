"""What is shipped: a wheel that trains outside of the checkout, versions that were tested, templates that are valid."""

import importlib.util as importlib_util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from launching import ROOT
from packaging.requirements import Requirement
from packaging.version import Version
from warm import free_port

import mega_scale
from mega_scale.command import commands, main
from mega_scale.config import parse

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# One step of the default job, on short rows.
SHORT = ["train.steps=2", "train.eval_every=0", "train.sample_every=0", "data.sequence_length=128"]
LOAD = """
from transformers import AutoModelForCausalLM
import mega_scale, sys
print(mega_scale.__file__, AutoModelForCausalLM.from_pretrained(sys.argv[1]).num_parameters())
"""


def run(*words, **options):
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, f"{words}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"
    return done.stdout


@pytest.mark.launch
@pytest.mark.slow
def test_a_wheel_has_all_that_git_has_and_trains_on_two_ranks_outside_of_the_checkout(tmp_path):
    source, here, site = tmp_path / "source", tmp_path / "elsewhere", tmp_path / "site"
    source.mkdir()
    here.mkdir()
    files = run("git", "ls-files", "mega_scale", "launch", "configs", "pyproject.toml", "README.md", cwd=ROOT).split()
    run("tar", "cf", tmp_path / "source.tar", *files, cwd=ROOT)
    run("tar", "xf", tmp_path / "source.tar", cwd=source)
    pip = (sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "-w", tmp_path, source)
    run(*pip, "install", "--no-deps", "--no-compile", "--target", site, *tmp_path.glob("*.whl"))

    shipped = {str(path.relative_to(site / "mega_scale")) for path in (site / "mega_scale").rglob("*")}
    wanted = {name.removeprefix("mega_scale/") for name in files if "/" in name and not name.endswith("README.md")}
    assert not wanted - shipped

    # As where the extras are not installed.
    (site / "sitecustomize.py").write_text("import sys\nsys.modules |= dict.fromkeys(('deepspeed', 'accelerate'))\n")
    own = {"PYTHONPATH": str(site), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    use = {"cwd": here, "env": os.environ | own | {"HF_HUB_OFFLINE": "1"}}
    command = site / "bin/mega-scale"
    ranks = ["--nproc-per-node=2", f"--master-port={free_port()}"]
    said = run(command, *ranks, "pretrain", "--config", "debug", *SHORT, **use)
    assert json.loads((here / "runs/debug/status.json").read_text())["state"] == "finished"
    assert "fsdp" in said
    # What the end line says to do next can be done here.
    following = said.partition("; next: ")[2].split()[:4]
    assert following == ["mega-scale", "export", "runs/debug", "exports/debug"]
    run(command, *following[1:], **use)
    place, parameters = run(sys.executable, "-c", LOAD, "exports/debug", **use).split()
    assert place.startswith(str(site)) and int(parameters) > 600_000


def test_the_command_names_its_scripts_and_refuses_another(capsys, monkeypatch):
    scripts = {path.stem for path in (ROOT / "launch").glob("[!_]*.py")} | {"benchmark"}
    assert set(commands()) == scripts
    main(["--version"])
    assert capsys.readouterr().out == f"mega_scale {mega_scale.__version__}\n"
    for arguments in (["train"], ["train", "pretrain"], ["--nproc-per-node=2"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        said = capsys.readouterr().err
        assert arguments[0] in said and "pretrain" in said and said.count("\n") == 1
    started = []
    monkeypatch.setattr(os, "execv", lambda program, words: sys.exit(started.extend(words)))
    with pytest.raises(SystemExit):
        main(["--nnodes", "2", "--node-rank=1", "pretrain", "--nnodes", "train.steps=3"])
    script = str(ROOT / "launch/pretrain.py")
    assert started[1:] == [
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--node-rank=1",
        script,
        "--nnodes",
        "train.steps=3",
    ]


def test_a_script_gets_its_arguments_by_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mega-scale", "generate", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "usage: generate" in capsys.readouterr().out


def test_recipes_go_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for recipe in (ROOT / "configs").glob("*.yaml"):
        assert parse(["--config", recipe.stem]) == parse(["--config", str(recipe)])
    Path("debug").write_text("train: {steps: 3}")
    assert parse(["--config", "debug"]).train.steps == 3  # what lies here comes first
    with pytest.raises(SystemExit, match="2"):
        parse(["--config", "enwik9"])
    assert "enwik8-39m" in capsys.readouterr().err


def test_deepspeed_is_asked_for_where_it_is_not_installed(monkeypatch):
    find_spec = importlib_util.find_spec
    monkeypatch.setattr(importlib_util, "find_spec", lambda name: None if name == "deepspeed" else find_spec(name))
    with pytest.raises(ValueError, match=r"parallel\.engine.*mega_scale\[deepspeed\].*fsdp"):
        parse(["parallel.engine=deepspeed"]).validate(1)
    default = parse([])
    default.validate(1)
    assert default.parallel.engine == "fsdp"


def test_each_lowest_version_is_the_one_that_is_tested():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {
        name.lower(): Version(version) for name, _, version in (line.partition("==") for line in lines) if version
    }
    extras = PROJECT["project"]["optional-dependencies"].values()
    for text in (*PROJECT["project"]["dependencies"], *(text for extra in extras for text in extra)):
        requirement = Requirement(text)
        if requirement.name == "mega_scale":
            continue
        (floor,) = (s.version for s in requirement.specifier if s.operator == ">=")
        tested = pinned[requirement.name.lower()]
        assert tested.release[: len(Version(floor).release)] == Version(floor).release, text
        assert requirement.specifier.contains(tested), text


def test_packages_are_all_declared():
    folders = {path.parent for name in ("mega_scale", "launch") for path in (ROOT / name).rglob("__init__.py")}
    names = {".".join(path.relative_to(ROOT).parts) for path in folders}
    names = {name if name.startswith("mega_scale") else f"mega_scale.{name}" for name in names}
    assert names | {"mega_scale.configs"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_workflow_and_the_image_pass_their_linters():
    programs = Path(sys.executable).parent
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert workflows
    run(programs / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    image = ROOT / "launch/Dockerfile"
    run(programs / "hadolint", image)
    text = image.read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.M):
        assert all((ROOT / name).exists() for name in line.split())
    (extras,) = re.findall(r"'\.\[(.*)\]'", text)
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])


def test_the_kubernetes_template_is_valid_and_its_run_resolves():
    path = ROOT / "launch/kubernetes.yaml"
    run(Path(sys.executable).parent / "kubernetes-validate", "--strict", path)
    service, job = yaml.safe_load_all(path.read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
    assert f"--master-addr={job['metadata']['name']}-0.{service['metadata']['name']}" in container["command"]
    config = parse(container["args"])
    assert config.run_dir.startswith("/shared/") and config.resume == "auto"
    config.parallel.validate(job["spec"]["completions"] * int(container["resources"]["limits"]["nvidia.com/gpu"]), 8)


def test_the_run_of_the_skypilot_template_resolves():
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    words = shlex.split(task["run"].replace("\\\n", " "), comments=True)
    config = parse(words[words.index("mega_scale.launch.pretrain") + 1 :])
    assert config.run_dir.startswith(next(iter(task["volumes"]))) and config.resume == "auto"
    config.parallel.validate(task["num_nodes"] * int(task["resources"]["accelerators"].split(":")[1]), 8)
