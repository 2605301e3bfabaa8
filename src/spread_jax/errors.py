"""The error of a program's settings."""

__all__ = ["UsageError"]


class UsageError(Exception):
    """A setting that cannot work; the message says what to do.

    Example:
      >>> raise UsageError("--steps must be at least 1, got 0.")
      Traceback (most recent call last):
      spread_jax.errors.UsageError: --steps must be at least 1, got 0.
    """
