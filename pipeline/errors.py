"""What ends a command with one line on stderr instead of a traceback."""


class StageError(Exception):
    """The work can't go on, through no mistake in the settings: a full disk, a store that is away."""

    status = 1


class OutOfMemoryError(StageError):
    """The device has too little memory for the work as it is set."""


class UsageError(StageError):
    """The user's mistake. The message names the setting, its value and what is allowed."""

    status = 2
