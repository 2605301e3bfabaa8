"""Training for any model: players and their step, a loop, checkpoints, run folders, meshes."""

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
from spread_jax.training.players import (
    LossOutput,
    Player,
    Round,
    TrainState,
    create_train_state,
    make_train_step,
)
from spread_jax.training.run_directory import RunDirectory, RunDirectoryError, SavedRun, read_run
from spread_jax.training.schedules import learning_rate_schedule, noise_scale_schedule
from spread_jax.training.signals import StopRequest

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "LossOutput",
    "NonFiniteLossError",
    "Player",
    "Restored",
    "Round",
    "RunDirectory",
    "RunDirectoryError",
    "SavedRun",
    "StepRecord",
    "StopRequest",
    "TrainState",
    "TrainingInterrupted",
    "abstract_state",
    "batch_sharding",
    "create_train_state",
    "every",
    "learning_rate_schedule",
    "local_copy",
    "make_mesh",
    "make_train_step",
    "noise_scale_schedule",
    "place_batch",
    "place_state",
    "read_run",
    "state_shardings",
    "train",
]
