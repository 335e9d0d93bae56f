"""A Megalodon, a Mega and transformers' Llama of one size, trained on the same tokens: validation losses and tokens/s.

    PYTHONPATH=tests/support python tests/campaigns/families.py --json families.json

All three are trained by one plain loop in one process, step by step in turns, with the rows, seed, tokenizer, schedule
and optimizer of configs/debug.yaml, each at several learning rates. Then `launch/pretrain.py` trains ours at the best
one, on two ranks, with DeepSpeed under deepspeed and with FSDP2 under torchrun.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from launching import LAUNCHERS, ROOT, start

sys.path.append(str(ROOT))  # for launch
from launch.benchmark.ours import count_parameters, megalodon_config
from launch.benchmark.peers import PEERS
from mega_scale.config import load_config, model_config
from mega_scale.data import Loader, load_datasets, load_tokenizer, validation_batches
from mega_scale.model import MegaConfig, causal_lm_class
from mega_scale.model.basic_layers import use_own_linear
from mega_scale.training.config import Schedule

ENGINES = {"deepspeed": "deepspeed", "torchrun": "fsdp"}
NAMES = {"megalodon": "Megalodon", "mega": "Mega", "llama": "transformers' Llama"}
MEGALODON_KEYS = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "shared_representation_size", "nffn_hidden_size",
    "ema_projection_size", "chunk_size", "timestep_norm_groups", "tie_word_embeddings",
)  # fmt: skip


def write_runs(folder, args):
    """A configuration file of the default job for each of our families; returns them by family."""
    job = yaml.safe_load((ROOT / "configs/debug.yaml").read_text())
    width = {"hidden_size": args.hidden, "intermediate_size": 2 * args.hidden, "nffn_hidden_size": 2 * args.hidden}
    job["model"] |= width | {"num_hidden_layers": args.layers, "shared_representation_size": args.hidden // 2}
    job["data"] |= {"sequence_length": args.length}
    job["train"] |= {
        "steps": args.steps, "global_batch_size": args.rows, "micro_batch_size": args.rows // 2, "sample_every": 0,
        "eval_every": 0, "log_every": max(args.steps // 4, 1),
    }  # fmt: skip
    job["parallel"] |= {"self_test": False}
    job["checkpoint"] |= {"every": 0}
    mega = job["model"]
    sizes = {"hidden": args.hidden, "layers": args.layers, "values": mega["intermediate_size"]}
    sizes |= {"shared": mega["shared_representation_size"], "states": mega["ema_projection_size"]}
    sizes |= {"chunk": mega["chunk_size"], "vocabulary": len(load_tokenizer("byte")), "normalization": "layernorm"}
    other = megalodon_config(sizes).to_dict()
    models = {"mega": mega, "megalodon": {"type": "megalodon", **{key: other[key] for key in MEGALODON_KEYS}}}
    for family, model in models.items():
        (folder / f"{family}.yaml").write_text(yaml.safe_dump(job | {"model": model}))
    return {family: folder / f"{family}.yaml" for family in models}, sizes


class Candidate:
    """A model at one learning rate, with its optimizer and what its steps took."""

    def __init__(self, family, rate, run, sizes):
        torch.manual_seed(run.train.seed)
        if family == "llama":
            self.model = PEERS["llama"][1](sizes, run.data.sequence_length)
        else:
            config = model_config(run.model, load_tokenizer(run.data.tokenizer))
            self.model = causal_lm_class(config)(config)
            use_own_linear(self.model)
        self.family, self.rate, self.run, self.seconds = family, rate, run, []
        self.run.optimizer.lr, self.run.schedule.min_lr = rate, rate / 10
        self.schedule = Schedule(run)
        decays = [p for p in self.model.parameters() if p.ndim == 2]
        rest = [p for p in self.model.parameters() if p.ndim != 2]
        how = run.optimizer
        groups = [{"params": decays, "weight_decay": how.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(how.beta1, how.beta2), eps=how.eps, fused=True)

    def losses(self, batch):
        """Summed loss, and number of tokens that count."""
        labels = batch["shift_labels"]
        logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits.float()
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total, int((labels != -100).sum())

    def step(self, number, batches):
        self.model.train()
        began = time.process_time()
        seen = sum(int((batch["shift_labels"] != -100).sum()) for batch in batches)
        for batch in batches:
            (self.losses(batch)[0] / seen).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.optimizer.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(time.process_time() - began)

    @torch.no_grad()
    def evaluate(self, dataset):
        """Validation loss, nats a token, on the rows that a run evaluates on."""
        self.model.eval()
        train = self.run.train
        batches = validation_batches(
            dataset, train.eval_batches * train.global_batch_size, train.micro_batch_size, 0, 1
        )
        found = [self.losses(batch) for batch in batches]
        return float(sum(total for total, _ in found)) / sum(count for _, count in found)


def plain_loop(runs, sizes, rates):
    """Train all candidates in turns; a row of figures for each."""
    torch.set_num_threads(1)
    shared = load_config(runs["mega"])
    candidates = [
        Candidate(family, rate, load_config(runs.get(family, runs["mega"])), sizes)
        for family in NAMES for rate in rates
    ]  # fmt: skip
    train = shared.train
    dataset, validation = load_datasets(shared.data, load_tokenizer(shared.data.tokenizer), print)
    how = {"global_batch_size": train.global_batch_size, "micro_batch_size": train.micro_batch_size, "rank": 0}
    loader = Loader(dataset, **how, world_size=1, seed=shared.data.seed, shuffle=shared.data.shuffle)
    for number in range(train.steps):
        batches = loader.batches(number)
        for candidate in candidates:
            candidate.step(number, batches)
    tokens = train.global_batch_size * shared.data.sequence_length
    return [
        {
            "family": one.family, "lr": one.rate, "parameters": one.model.num_parameters(),
            "loss": one.evaluate(validation), "rate": tokens / sorted(one.seconds)[len(one.seconds) // 2],
        }
        for one in candidates
    ]  # fmt: skip


def launched(launcher, run, rate, folder):
    """Validation loss and tokens/s of a run by `launch/pretrain.py`."""
    run_dir = folder / f"{run.stem}-{launcher}"
    changes = [f"run_dir={run_dir}", f"optimizer.lr={rate}", f"schedule.min_lr={rate / 10}"]
    arguments = ["--config", str(run), *changes, f"parallel.engine={ENGINES[launcher]}"]
    code, output = start(LAUNCHERS[launcher], arguments, timeout=3600)
    if code:
        raise RuntimeError(f"{launcher} ended with {code}:\n{output[-4000:]}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = {line["part"]: line for line in lines}  # of each kind
    speed = last["train"]["tokens_per_second"]
    return {"family": run.stem, "launcher": launcher, "lr": rate, "loss": last["validation"]["loss"], "rate": speed}


def table(rows):
    """The study's table, as Markdown."""
    lines = [
        "| model | parameters | trained by | lr | validation loss, nats/token | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        count, by = f"{row['parameters']:,}" if "parameters" in row else "", row.get("launcher", "plain loop")
        lines.append(
            f"| {NAMES[row['family']]} | {count} | {by} | {row['lr']} | {row['loss']:.4f} | {row['rate']:,.0f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=128, help="channels D")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3], help="learning rates")
    parser.add_argument("--launchers", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1048576"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs, sizes = write_runs(folder, args)
        mega = model_config(load_config(runs["mega"]).model, load_tokenizer("byte"))
        assert isinstance(mega, MegaConfig)
        sizes["parameters"] = count_parameters(mega)
        rows = plain_loop(runs, sizes, args.rates)
        print(table(rows), flush=True)
        best = {family: min((r for r in rows if r["family"] == family), key=lambda r: r["loss"]) for family in NAMES}
        assert all(math.isfinite(row["loss"]) for row in best.values())
        for family, run in runs.items():
            for launcher in args.launchers:
                rows.append(launched(launcher, run, best[family]["lr"], folder))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
