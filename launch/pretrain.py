"""Pretrains a Mega causal language model; starts under deepspeed, torchrun, accelerate launch, or plain python.

deepspeed --quiet --num_accelerators 2 launch/pretrain.py --config configs/debug.yaml train.steps=200
"""

# ruff: noqa: E402
import signal

if __name__ == "__main__":
    # Kept until somebody listens: the imports take seconds.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})

import gc

from mega_scale.process import StopSignals, keep_streams, refuse, run_command

SIGNALS = StopSignals()
if __name__ == "__main__":
    SIGNALS.listen()  # before all other imports
    keep_streams()
    gc.disable()  # until all is imported: looking for garbage, again and again, takes half a second of CPU

import importlib
import sys
from collections.abc import Sequence

from mega_scale.config import parse
from mega_scale.parallel.mesh import placement


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what is refused is said in one line, with exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--rehearse" in words:
        from mega_scale.planner.command import main as plan

        words.remove("--rehearse")
        run_command(lambda: plan(words))
    try:
        place = placement()
    except ValueError as error:
        refuse(error)
    config = parse(words, quiet=place.rank != 0)
    try:
        config.validate(place.size, place.local_size)
        from mega_scale.training.trainer import Trainer  # takes seconds, which help and most refusals do without

        if __name__ == "__main__":
            gc.freeze()  # what imports made stays: looking through it, in pauses of a run and at the end, takes 0.4 s
            gc.enable()
        trainer = Trainer(config, place, SIGNALS)
        if __name__ == "__main__":
            # Only now are the values known to be good; until here, a signal is remembered in any case.
            SIGNALS.listen(config.train.stop_signals)
    except (ValueError, OSError) as error:
        if place.rank == 0:
            refuse(error)
        # The first rank, if it is not refused, comes to meet the others after the same imports.
        importlib.import_module("mega_scale.training.trainer")
        from mega_scale.parallel.monitor import tell_refusal

        refuse(error, quiet=not tell_refusal(place.rank, error, lambda: SIGNALS.asked))
    if code := trainer.run():
        raise SystemExit(code)


if __name__ == "__main__":
    main()
