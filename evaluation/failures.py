"""What could not be computed: said at once and again at the end, while everything else goes on."""

import contextlib
import os
from collections.abc import Iterator

from files.console import InputError, warn
from files.writing import WriteError


def task_errors() -> tuple[type[Exception], ...]:
    """What mteb's tasks, and the libraries that load their data, raise for data that is missing or is not what they expect."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError
    from pyarrow import ArrowException

    of_python = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, AssertionError, ImportError)
    return (*of_python, MemoryError, DatasetsError, ArrowException, HTTPError)


def reason(error: Exception) -> str:
    """One line on an error: what the user reads of an InputError, else its class as well."""
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}".removesuffix(": ")[:300]


def add_failure(failures: list[str], text: str) -> None:
    """Keep why something is missing, and say it, once."""
    if text not in failures:
        failures.append(text)
        warn(text)


def several_processes() -> bool:
    """Under torchrun a process that fails alone would no longer meet the others, which would wait for it: it must not go on."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextlib.contextmanager
def others_go_on(failures: list[str], what: str, *, alone: bool = False) -> Iterator[None]:
    """Let what fails inside not cost the others their scores: `what` and the reason are added to `failures`.

    alone    there are no others: the InputError itself is what there is to say
    A WriteError goes on upwards: what follows could not be written either.
    """
    try:
        yield
    except WriteError:
        raise
    except task_errors() as error:
        if several_processes() or (alone and isinstance(error, InputError)):
            raise
        add_failure(failures, f"{what}: {reason(error)}")
