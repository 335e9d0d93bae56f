"""RunConfig: everything that a run is told, composed of the sections that sit beside their owners."""

from dataclasses import dataclass, field

from mega_scale.config.checks import check
from mega_scale.config.model_section import ModelSection
from mega_scale.data.config import DataConfig
from mega_scale.files import local_path
from mega_scale.parallel.config import ParallelConfig
from mega_scale.training.bad_steps import BadStepsConfig
from mega_scale.training.checkpoint import CheckpointConfig
from mega_scale.training.optimizer import OptimizerConfig
from mega_scale.training.schedule import ScheduleConfig
from mega_scale.training.train_config import TrainConfig


@dataclass
class RunConfig:
    """The run"""

    run_dir: str = "runs/debug"
    """Folder for checkpoints, TensorBoard events and the resolved configuration (path)."""

    resume: str | None = None
    """Checkpoint to continue from: "latest" in run_dir, "auto" the same if any, or a checkpoint folder (path).
    Model and tokenizer are the checkpoint's; a `model` key that is given must agree, unless it is one of dropout."""

    overwrite: bool = False
    """Whether a run that lies in run_dir is replaced, its checkpoints deleted, once the new one begins (no unit)."""

    init_from: str | None = None
    """Folder of an export or a Hugging Face model from which the initial weights are taken (path). Model and
    tokenizer are that folder's, as for resume."""

    model: ModelSection = field(default_factory=ModelSection)
    """The model"""

    data: DataConfig = field(default_factory=DataConfig)
    """The text"""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW"""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate's schedule"""

    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop"""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is spread over ranks"""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints"""

    bad_steps: BadStepsConfig = field(default_factory=BadStepsConfig)
    """Steps whose loss or gradient is not finite, or whose loss jumps"""

    def __post_init__(self) -> None:
        for key in ("run_dir", "resume", "init_from"):
            if isinstance(value := getattr(self, key), str):
                setattr(self, key, local_path(value, key))

    def validate(self, world_size: int, local_size: int | None = None) -> None:
        """Refuse values and combinations with which no run can start, before any process group does.

        Creates `run_dir`, to see that it can be written.

        Args:
            world_size: number of ranks of the run.
            local_size: number of ranks on this host; None where all are on one.

        Raises:
            ValueError: names the keys, their values and a remedy.
        """
        check(self, world_size, local_size)
