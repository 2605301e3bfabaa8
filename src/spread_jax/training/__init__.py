"""Training: a state, a step, two players' step, a loop, checkpoints, meshes; knows no particular model."""

from spread_jax.training.alternating import (
    AlternatingState,
    AscentSchedule,
    NoiseCollapseError,
    check_noise_range,
    create_alternating_state,
    make_alternating_step,
)
from spread_jax.training.checkpoint import Checkpointer, CheckpointError, Restored
from spread_jax.training.loop import NonFiniteLossError, StepRecord, TrainingInterrupted, every, train
from spread_jax.training.parallel import (
    abstract_state,
    batch_sharding,
    local_copy,
    make_mesh,
    place_batch,
    place_state,
    state_shardings,
)
from spread_jax.training.run_directory import RunDirectory, RunDirectoryError, SavedRun, read_run
from spread_jax.training.schedules import learning_rate_schedule, noise_scale_schedule
from spread_jax.training.signals import StopRequest
from spread_jax.training.state import LossOutput, TrainState, create_train_state, make_train_step

__all__ = [
    "AlternatingState",
    "AscentSchedule",
    "CheckpointError",
    "Checkpointer",
    "LossOutput",
    "NoiseCollapseError",
    "NonFiniteLossError",
    "Restored",
    "RunDirectory",
    "RunDirectoryError",
    "SavedRun",
    "StepRecord",
    "StopRequest",
    "TrainState",
    "TrainingInterrupted",
    "abstract_state",
    "batch_sharding",
    "check_noise_range",
    "create_alternating_state",
    "create_train_state",
    "every",
    "learning_rate_schedule",
    "local_copy",
    "make_alternating_step",
    "make_mesh",
    "make_train_step",
    "noise_scale_schedule",
    "place_batch",
    "place_state",
    "read_run",
    "state_shardings",
    "train",
]
