"""Every error that Tolaria raises on purpose, by what the caller can do about it.

    TolariaError
    |-- ConfigError          fix the configuration or the command line      (exit 2)
    |-- TaskError            fix the task: the user's model, data or loss   (exit 2)
    |-- RunDirError          choose another run directory, or mend this one (exit 73)
    |   `-- RunLocked        another process trains here; wait or stop it   (exit 75)
    |-- CommandRefused       nothing changed; the reason goes to the policy
    |-- MessageRejected      a peer sent something that is not acceptable; ignore it
    |-- PolicyUnavailable    no acceptable answer in time; fall back
    |-- CheckpointError      this checkpoint cannot be used; take an older one
    |   `-- CheckpointMismatch  it is sound, but it belongs to another model
    |-- ReplicaMismatch      ranks hold different state; the run must not go on (exit 70)
    |-- PeerLost             a rank is gone or silent; leave, torchrun restarts (exit 71)
    |-- WalError             the log of decisions cannot be read or written (exit 74)
    |-- TrainingUnstable     going back did not help; look at data and learning rate (exit 65)
    |-- CrashLoop            three starts ended at one step; mend the cause, then resume (exit 69)
    `-- RunHalted            an emergency halted the run; clear it, then resume (exit 69)

The exit codes follow sysexits.h; 0 is a finished run.
"""


class TolariaError(Exception):
    """Root of the tree. ``exit_code`` is what ``python -m tolaria.launch`` returns."""

    exit_code = 1


class ConfigError(TolariaError):
    """A configuration key is unknown, has the wrong type, or contradicts another."""

    exit_code = 2


class TaskError(TolariaError):
    """The task could not be built, or broke its contract."""

    exit_code = 2


class RunDirError(TolariaError):
    """The run directory cannot be used."""

    exit_code = 73


class RunLocked(RunDirError):
    """Another live process holds the run directory."""

    exit_code = 75


class RunUnreachable(TolariaError):
    """A live run was to be reached and was not."""

    exit_code = 75


class CommandRefused(TolariaError):
    """A command is not legal now. ``code`` is stable; the message is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class MessageRejected(TolariaError):
    """A received message failed validation. ``code`` is stable; the message is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class PolicyUnavailable(TolariaError):
    """No acceptable reply came before the deadline. ``code`` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class CheckpointError(TolariaError):
    """A checkpoint is incomplete, damaged, or not a checkpoint."""

    exit_code = 74


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint whose content does not fit this model or run."""


class ReplicaMismatch(TolariaError):
    """Ranks that must be equal are not."""

    exit_code = 70


class PeerLost(TolariaError):
    """A collective failed because another rank is gone or silent."""

    exit_code = 71


class WalError(TolariaError):
    """The write-ahead log cannot be trusted or written; no decision may take effect any more."""

    exit_code = 74


class TrainingUnstable(TolariaError):
    """Training failed again after every return to an earlier state."""

    exit_code = 65


class CrashLoop(TolariaError):
    """The run died again and again without getting any further."""

    exit_code = 69


class RunHalted(TolariaError):
    """An emergency of the highest level stopped the run until a person clears it."""

    exit_code = 69
