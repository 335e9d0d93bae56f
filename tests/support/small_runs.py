"""Runs of launch/pretrain.py in the tests' own process, which take a second."""

import contextlib
import io

from commands import exit_code

from launch.pretrain import main as pretrain

MODEL = {
    "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "nffn_hidden_size": 20, "chunk_size": 16,
    "shared_representation_size": 8, "ema_projection_size": 2, "use_chunking": True, "attention_activation": "laplace",
    "activation": "gelu", "dropout_prob": 0.1, "normalization_type": "rmsnorm",
}  # fmt: skip
TINY = [
    "data.source=json", "data.sequence_length=32", "train.global_batch_size=2", "train.micro_batch_size=2",
    "train.eval_every=0", "train.eval_batches=1", "train.sample_every=0", "train.tensorboard=false",
    "schedule.warmup_steps=0", "schedule.min_lr=0", "data.validation_fraction=0.5", "checkpoint.every=2",
    "optimizer.lr=0.05", "parallel.engine=fsdp", "parallel.self_test=false",
]  # fmt: skip


def run(*words, command=pretrain):
    """Exit code and all that was printed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = exit_code(command, *words)
    return code, text.getvalue()
