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

    def __init__(self, message: str, *, traceback: str = "", exited: bool = False) -> None:
        super().__init__(message)
        self.traceback = traceback
        self.exited = exited
        """Whether it meant to end its process, which is no refusal of the request."""


class NotAskedError(ConformanceError):
    """The harness cannot hand a request to the engine; a case about it says nothing of the engine then.

    Adapters raise it in their worker, which imports nothing but the standard library.
    """


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
