"""What can go wrong by a user's hand. Each message says what it got, what it wanted, and the cure."""

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 143  # as a process that SIGTERM ended


class NestlmError(ValueError):
    """Base of all errors that a user can cause and cure; the command line prints them without a traceback."""


class ConfigError(NestlmError):
    """A name, a type or a value in the configuration that cannot be used."""


class NotAllowedError(ConfigError):
    """A config that names code which it may not run; see `nestlm.config.allowlist`."""


class BudgetError(NestlmError):
    """A budget that no sub-network meets, or that is not a budget at all."""


class DataError(NestlmError):
    """Text, tokens or a folder that cannot be read."""


class CheckpointError(NestlmError):
    """Weights that are missing, damaged, or of another model."""


class DivergenceError(NestlmError):
    """Training that has left the finite numbers."""


class Preempted(NestlmError):  # noqa: N818 (nothing went wrong)
    """Training that was told to end, and can go on."""


class ResourceError(NestlmError):
    """Space, permission, open files or memory that the machine lacks."""


class DeviceMemoryError(NestlmError):
    """A step that needs more memory than a device has."""


class ExportError(NestlmError):
    """A model that a format cannot hold, or a place that it cannot be written to."""
