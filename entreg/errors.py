"""Errors that a user can act on.

Every class carries one clear sentence: what was wrong and what would be right. The command-line entry points
(:mod:`entreg.cli`) print that sentence and exit with status 2; any other exception is a defect of ours and keeps
its traceback.
"""


class EntregError(Exception):
    """Base of all errors that a user can act on."""


class InputError(EntregError, ValueError):
    """An argument has a wrong shape, dtype, value or combination of values."""


class ConfigError(EntregError):
    """A configuration names something that does not exist or asks for an impossible combination."""


class AssetError(EntregError):
    """A data set or model file is missing, unreachable or damaged."""


class RecordError(EntregError):
    """A run record or the claims file is truncated, damaged or does not fit the schema."""


class OutputError(EntregError):
    """A result cannot be written: no permission, disk full, or a file stands where a folder is needed."""


class TrainingError(EntregError):
    """Training cannot go on: the loss or its gradient is not finite, in a step and a term that the sentence names."""


class ProcessError(EntregError):
    """One of several processes of a run was killed or failed, so that the others cannot go on."""


class BusyError(EntregError):
    """Another process is doing what was asked for."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
