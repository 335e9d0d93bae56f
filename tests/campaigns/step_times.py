"""A callback that notes when each step of a run ends, by the clock and by the processor time of its rank."""

import json
import time
from pathlib import Path

from mega_scale.training.callbacks import Callback


class StepTimes(Callback):
    """Writes `times-RANK.json` into the run folder: a pair of seconds a step, the processor's of all threads."""

    def __init__(self):
        self.ends = []

    def on_step(self, trainer, step, result):
        self.ends.append((time.perf_counter(), time.process_time()))

    def on_end(self, trainer, stopped):
        Path(trainer.config.folder, f"times-{trainer.world.rank}.json").write_text(json.dumps(self.ends))
