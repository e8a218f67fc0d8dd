"""Errors a user can meet: one paragraph each, saying what was given, what was expected, and what to do."""


class DisthessError(Exception):
    """Base of every error that disthess raises on purpose; the command line prints it without a traceback."""

    exit_code = 1


class ConfigError(DisthessError, ValueError):
    """A configuration file or a call's arguments are wrong (exit code 2 on the command line)."""

    exit_code = 2


class ProblemError(DisthessError, ValueError):
    """The model, loss or data cannot have a Hessian as given (NaN, not scalar, random, integer parameters ...)."""


class SecondDerivativeError(ProblemError):
    """Torch has no second derivative of an operation that the eager objective uses."""


class GraphError(DisthessError, RuntimeError):
    """The model could not be captured, or a use of a parameter is not covered by a rule."""


class RuleError(DisthessError, RuntimeError):
    """An operation has no usable second-derivative rule, or its rule failed its self-check."""


class PlanError(DisthessError, RuntimeError):
    """The work does not fit: too little disk, or a tile larger than the memory budget."""


class StoreError(DisthessError, RuntimeError):
    """A store is missing, damaged, incomplete, or belongs to another problem."""


class HeldError(StoreError):
    """Another run holds the lock of a store."""


class UnknownNameError(StoreError, KeyError):
    """A parameter, block or node name does not exist; near names are offered."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ExecutionError(DisthessError, RuntimeError):
    """Tiles failed for good; the store resumes once the cause is gone."""


class Interrupted(DisthessError):
    """The run was stopped by a signal after finishing the tiles in flight; running again resumes."""


class CertificateError(DisthessError, ArithmeticError):
    """The stored Hessian disagrees with Hessian-vector products of the eager model."""
