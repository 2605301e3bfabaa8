"""What the processes of one run tell one another."""

from __future__ import annotations

import jax
import numpy as np


def several() -> bool:
    """Whether this is one of several processes; does not start JAX's backend to find out that it is not.

    Example:
      >>> several()
      False
    """
    return jax.distributed.is_initialized() and jax.process_count() > 1


def agree(value: int) -> int:
    """The value process 0 has; the other processes' own value is ignored.

    Example:
      >>> agree(3)
      3
    """
    if not several():
        return int(value)
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))
