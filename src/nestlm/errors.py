"""Errors that a user can cause and fix. Each message says what it got, what it wanted, and the cure."""

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 143  # 128 + SIGTERM


class NestlmError(ValueError):
    """Base of all errors that a user can cause and fix; the command line prints them without a traceback."""


class ConfigError(NestlmError):
    """A name, type or value in the configuration is invalid."""


class NotAllowedError(ConfigError):
    """A config names code that it may not run; see `nestlm.config.allowlist`."""


class BudgetError(NestlmError):
    """A budget cannot be parsed, or no sub-network meets it."""


class DataError(NestlmError):
    """Text, tokens or another data file is missing, damaged or unsuitable."""


class CheckpointError(NestlmError):
    """Weights are missing, damaged, or belong to another model."""


class DivergenceError(NestlmError):
    """The training loss or its gradient is infinite or NaN."""


class Preempted(NestlmError):  # noqa: N818 (nothing went wrong)
    """A signal ended training; the same command resumes it."""


class ResourceError(NestlmError):
    """The machine lacks disk space, permissions, open files or memory."""


class DeviceMemoryError(NestlmError):
    """A step needs more memory than a device has."""


class ExportError(NestlmError):
    """A format cannot represent the model, or the export cannot be written."""
