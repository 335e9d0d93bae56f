"""Continues a text with a trained model: a run, a checkpoint, an export or a Hugging Face folder.

python launch/generate.py runs/debug --prompt "def main(" --max-new-tokens 200
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # imports take seconds; run_command unblocks it

import argparse
from collections.abc import Sequence

import torch

from mega_scale.checkpoint.folder import read_key
from mega_scale.checkpoint.remote import localized
from mega_scale.data.config import cache_folder
from mega_scale.files import path_or_url
from mega_scale.hub.export import DTYPES
from mega_scale.parallel import check_single
from mega_scale.process import log_to_stderr, run_command
from mega_scale.settings import require
from mega_scale.training.trained_model import CACHES, check_sample, generate_text, load_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Raises ValueError or OSError for what is refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words = "run (its newest checkpoint) or checkpoint, here or in an object store, export or HF folder"
    parser.add_argument("model", type=path_or_url, help=words)
    parser.add_argument("--prompt", default="", help="text to continue; empty begins a document")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens to generate (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of probability sampled from (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--key-file", help="secret with which the checkpoint is signed")
    parser.add_argument("--stop-at-eos", action="store_true", help="end at the end-of-text token")
    words = "dynamic, or static: steps of fixed shapes, compiled on a GPU, which pays for long texts (default: dynamic)"
    parser.add_argument("--cache", choices=CACHES, default=CACHES[0], help=words)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights (default: fp32)")
    args = parser.parse_args(arguments)
    check_single("launch/generate.py", args)
    require(args.max_new_tokens > 0, "--max-new-tokens", args.max_new_tokens, "give at least 1")
    require(args.temperature >= 0, "--temperature", args.temperature, "give 0 or more")
    require(0 < args.top_p <= 1, "--top-p", args.top_p, "give more than 0, and at most 1")
    device, key = torch.device(args.device), read_key(args.key_file)
    path = localized(args.model, cache_folder(None), key, log_to_stderr)
    model, tokenizer, folder = load_model(path, device, DTYPES[args.dtype], key)
    check_sample(model.config, tokenizer, args.prompt, args.max_new_tokens)
    log_to_stderr(f"text by {folder}")
    names = ("max_new_tokens", "seed", "temperature", "top_p", "stop_at_eos", "cache")
    sampling = {name: getattr(args, name) for name in names}
    print(generate_text(model, tokenizer, args.prompt, **sampling))


if __name__ == "__main__":
    run_command(main)
