"""Errors of the harness. Each message says what is wrong, where, and what to do about it."""


class ConformanceError(Exception):
    """Base of every error a user of the harness can cause or meet."""


class UsageError(ConformanceError):
    """A command was given arguments that make no sense together."""


class SuiteError(ConformanceError):
    """A suite file is broken: names the file, the line and the field."""


class TargetError(ConformanceError):
    """A target cannot be used at all (unknown name, environment missing)."""


class EngineError(ConformanceError):
    """The engine under test raised while it handled one request."""

    def __init__(self, message: str, *, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class WorkerDiedError(ConformanceError):
    """The engine's worker process ended, or broke the protocol, while a request was open."""

    def __init__(self, message: str, *, stderr_tail: str = "") -> None:
        super().__init__(message)
        self.stderr_tail = stderr_tail


class TargetTimeoutError(ConformanceError):
    """A request was not answered before its deadline."""

    def __init__(self, message: str, *, stderr_tail: str = "") -> None:
        super().__init__(message)
        self.stderr_tail = stderr_tail


class NotRecordedError(ConformanceError):
    """A recording holds no answer to what a case asks; the case says nothing then."""

    def __init__(self, message: str, *, asked: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.asked = asked
        """What was asked: `conformance.targets.replay.Asked`."""


class RunFileError(ConformanceError):
    """A run file cannot be read, or does not belong to what is being resumed."""
