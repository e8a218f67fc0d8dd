"""Problems from names: ``"package.module:factory"`` or ``"path/to/file.py:factory"``, and weights from checkpoints.

1. The factory is imported; a file's own folder is importable while it loads, as if it were run as a script.
2. It is called with the arguments given and must return a `disthess.Problem`.
3. A checkpoint, where given, is read without executing code and copied into the model, name by name, all or nothing.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from disthess.errors import ConfigError, DisthessError, ProblemError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from disthess.problem import Problem

CheckpointFormat = Literal["safetensors", "torch"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights to load into the model of a factory.

    Attributes:
        path: The file.
        format: ``safetensors``, or ``torch`` (read with ``weights_only=True``, always).
        prefix: Removed from the front of every name; names without it are ignored.
        key: For ``torch`` files that hold more than weights: the entry that holds the state dict.
    """

    path: str
    format: CheckpointFormat
    prefix: str = ""
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where a problem comes from.

    Attributes:
        factory: ``"package.module:function"`` or ``"path/to/file.py:function"``.
        arguments: Keyword arguments of the function.
        checkpoint: Weights to load afterwards, or None.
        folders: Where relative files are looked for, and what else is importable; first match wins.
    """

    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    folders: tuple[str, ...] = (".",)


def load_problem(source: Source) -> Problem:
    """Build the problem that a factory describes.

    Args:
        source: Factory, arguments and checkpoint.

    Returns:
        The factory's problem, with the checkpoint's weights where one is given.

    Raises:
        ConfigError: The factory does not exist, does not take the arguments, or does not return a `disthess.Problem`;
            the checkpoint cannot be read or does not match the model.
        ProblemError: The factory itself raised.
    """
    from disthess.problem import Problem

    with _importable(source.folders), _loaded(source.factory, source.folders) as factory:
        _check_arguments(source.factory, factory, source.arguments)
        try:
            problem = factory(**source.arguments)
        except DisthessError:
            raise
        except Exception as error:
            raise ProblemError(
                f"the factory {source.factory} raised {type(error).__name__}: {_first_line(error)}. Call it by hand with "
                f"the arguments {dict(source.arguments)} to see why, or run with --debug for the traceback."
            ) from error
    if not isinstance(problem, Problem):
        raise ConfigError(
            f"the factory {source.factory} returned {type(problem).__name__}, where a disthess.Problem is expected. Let it "
            "end in: return disthess.Problem(model, loss=..., batches=[(x, y)])."
        )
    if source.checkpoint is not None:
        load_checkpoint(problem.model, source.checkpoint, source.folders)
    return problem


def load_checkpoint(model: nn.Module, checkpoint: Checkpoint, folders: Sequence[str] = (".",)) -> None:
    """Copy a checkpoint's weights into a model; nothing is copied unless everything matches.

    A name may be missing if it is another name of a tensor that is given (safetensors stores tied tensors once).

    Args:
        model: Changed in place, keeps its dtypes.
        checkpoint: What to read.
        folders: Where a relative path is looked for.

    Raises:
        ConfigError: The file does not exist or is not of that format; names are missing or unexpected; shapes differ.
    """
    import torch

    path = _find_file(checkpoint.path, folders, "checkpoint")
    given = _stripped(_read_state(path, checkpoint), checkpoint.prefix)
    own = model.state_dict(keep_vars=True)
    held = {id(tensor) for name, tensor in own.items() if name in given}
    missing = [name for name, tensor in own.items() if name not in given and id(tensor) not in held]
    unexpected = [name for name in given if name not in own]
    if missing or unexpected:
        raise ConfigError(
            f"the checkpoint {path} does not match {type(model).__name__}: {_count(missing, 'missing')}; "
            f"{_count(unexpected, 'unexpected')}. Check the factory's arguments, or set checkpoint.prefix to what stands in "
            "front of every name in the file."
        )
    wrong = [
        f"{name} has {list(given[name].shape)}, the model {list(own[name].shape)}"
        for name in given
        if given[name].shape != own[name].shape
    ]
    if wrong:
        raise ConfigError(
            f"the checkpoint {path} does not match {type(model).__name__} in the shapes of {len(wrong)} tensors: "
            f"{'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''}. Check the factory's arguments."
        )
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)


def _read_state(path: Path, checkpoint: Checkpoint) -> Mapping[str, Any]:
    try:
        state = _read_safetensors(path) if checkpoint.format == "safetensors" else _read_torch(path)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the checkpoint {path} could not be read as {checkpoint.format}: {_first_line(error)}. Expected a state dict of "
            "plain tensors; files that need code to load are refused. Save it with safetensors.torch.save_file or "
            "torch.save(model.state_dict(), ...), and set checkpoint.format to match."
        ) from error
    if checkpoint.key is not None:
        if not isinstance(state, Mapping) or checkpoint.key not in state:
            found = ", ".join(map(str, list(state)[:8])) if isinstance(state, Mapping) else type(state).__name__
            raise ConfigError(f"the checkpoint {path} has no entry {checkpoint.key!r}; it holds {found}.")
        state = state[checkpoint.key]
    return _checked_state(state, path)


def _checked_state(state: Any, path: Path) -> Mapping[str, Any]:
    import torch

    if not isinstance(state, Mapping) or not state:
        raise ConfigError(f"the checkpoint {path} holds {type(state).__name__}, where named tensors are expected.")
    others = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ConfigError(
            f"the checkpoint {path} holds entries that are not tensors ({', '.join(others[:5])}). If one of them is the "
            "state dict, name it as checkpoint.key."
        )
    return state


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_torch(path: Path) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _stripped(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _count(names: Sequence[str], word: str) -> str:
    if not names:
        return f"none {word}"
    return f"{len(names)} {word} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"


@contextmanager
def _importable(folders: Sequence[str]) -> Iterator[None]:
    """Put folders first on the import path for a while, as Python does for a script's own."""
    added = [str(Path(folder).resolve()) for folder in folders]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            if folder in sys.path:
                sys.path.remove(folder)


@contextmanager
def _loaded(reference: str, folders: Sequence[str]) -> Iterator[Callable[..., Any]]:
    place, separator, name = reference.rpartition(":")
    if not separator or not place or not name.isidentifier():
        raise ConfigError(
            f"the factory {reference!r} is not of the form 'package.module:function' or 'path/to/file.py:function'."
        )
    if not place.endswith(".py"):
        yield _attribute(_import_module(place, reference), name, reference)
        return
    path = _find_file(place, folders, "factory file")
    # Left out of sys.modules afterwards, so that its classes and functions travel to Ray workers by value: a worker
    # could not import a file that is no part of any package.
    alias = f"disthess_factory_{path.stem}"
    with _importable([str(path.parent)]):
        try:
            yield _attribute(_execute_file(path, alias, reference), name, reference)
        finally:
            sys.modules.pop(alias, None)


def _execute_file(path: Path, alias: str, reference: str) -> Any:
    spec = importlib.util.spec_from_file_location(alias, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"the factory file {path} cannot be loaded as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _import_failure(reference, error) from error
    return module


def _import_module(place: str, reference: str) -> Any:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(error.name + ".")):
            raise ConfigError(
                f"the factory {reference!r} was given, but there is no module {error.name!r}. Looked in the current folder, beside "
                "the configuration file, and among the installed packages; a file can be given as 'path/to/file.py:function'."
            ) from error
        raise _import_failure(reference, error) from error
    except Exception as error:
        raise _import_failure(reference, error) from error


def _import_failure(reference: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"the factory {reference!r} could not be imported: {type(error).__name__}: {_first_line(error)}. Install what it "
        "needs, or mend the file; run with --debug for the traceback."
    )


def _attribute(module: Any, name: str, reference: str) -> Callable[..., Any]:
    factory = getattr(module, name, None)
    if callable(factory):
        return factory  # type: ignore[no-any-return]
    if factory is not None:
        raise ConfigError(f"the factory {reference!r} names {type(factory).__name__}, where a function is expected.")
    defined = [entry for entry, value in vars(module).items() if callable(value) and not entry.startswith("_")]
    near = difflib.get_close_matches(name, defined, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(f"the factory {reference!r} was given, but there is no function {name!r} in that module.{hint}")


def _check_arguments(reference: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"the factory {reference} does not take the arguments given ({', '.join(arguments) or 'none'}): {error}. Its "
            f"signature is {signature}."
        ) from error


def _find_file(path: str, folders: Sequence[str], what: str) -> Path:
    for folder in folders:
        candidate = Path(folder, path).expanduser()
        if candidate.is_file():
            return candidate.resolve()
    raise ConfigError(
        f"the {what} {path} does not exist. Relative paths are looked for in {' and '.join(map(str, folders))}."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")
