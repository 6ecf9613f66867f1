"""What a script says and how it ends: errors of the user, the guard around `main`, lines, progress.

Under torchrun every process runs the whole script. Ordinary lines and progress come from the first process alone; errors and
tracebacks come from whichever process they happen in.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

PROGRESS_SECONDS = 30.0  # between two lines of progress where standard error is no terminal


class InputError(ValueError):
    """Something the user gave that the user can correct. Scripts print it in one line and exit with status 2."""


def process_rank() -> int:
    """Number of this process among those that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def say(text: str, *, error: bool = False) -> None:
    """Print a line, from the first process only; `error`: to standard error."""
    if process_rank() == 0:
        _print(text, sys.stderr if error else sys.stdout)


def _print(text: str, stream: TextIO) -> None:
    """Print a line. Once the reader of a pipe has gone, as `| head` does, the stream is silent: the work goes on."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:  # what is still in the stream's buffer goes there too
            os.dup2(nowhere.fileno(), stream.fileno())


def short_path(path: str | Path) -> str:
    """A path as one would type it: from the working folder, unless it lies outside."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def reason(error: OSError) -> str:
    """What went wrong, such as "No space left on device", without number and file."""
    return error.strerror or str(error) or type(error).__name__


def warn(text: str) -> None:
    """Print a line that begins with "warning:" to standard error, from the first process only."""
    say(f"warning: {text}", error=True)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`: an InputError or OSError is one line and exit status 2, Ctrl-C is exit status 130."""
    try:
        main()
    except (InputError, OSError) as error:
        process = f", process {process_rank()}" if process_rank() else ""
        message = str(error)
        if isinstance(error, OSError):
            message = f"{error.filename}: {reason(error)}" if error.filename else reason(error)
        message = " ".join(line.strip() for line in message.splitlines())
        _print(f"{Path(sys.argv[0]).name}{process}: {message}", sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def duration(seconds: float) -> str:
    """A time in the unit in which one would say it: "40 s", "13 min", "2.5 h", "11 days"."""
    for name, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            number = seconds / length
            return f"{number:.1f} {name}" if name == "h" and number < 10 else f"{number:.0f} {name}"
    return f"{seconds:.0f} s"


class Progress:
    """Progress of a long job on standard error: a bar in a terminal, elsewhere a line every `PROGRESS_SECONDS`.

    It says how long is left where the total is known, else how fast it goes.

    total      of the job, in `unit`s; None where nobody knows
    initial    how much of it was done before
    disable    show nothing; also so in every process but the first
    """

    def __init__(self, total: int | None, what: str, unit: str, *, initial: int = 0, disable: bool = False):
        self.total, self.what, self.unit, self.done, self.bar = total, what, unit, initial, None
        self.disable, self.before, self.about = disable or process_rank() > 0, initial, ""
        self.began = self.spoke = time.monotonic()
        if not self.disable and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=initial, desc=what, unit=unit, leave=False, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def expect(self, total: int | None) -> None:
        """About how many units there are in all, as far as can be told by now."""
        self.total, self.about = total, "about "
        if self.bar is not None:
            self.bar.total = total

    def skip(self, n: int) -> None:
        """`n` more units were done before this job began: they say nothing of its speed."""
        self.done += n
        self.before += n
        if self.bar is not None:
            self.bar.initial += n
            self.bar.update(n)

    def update(self, n: int = 1, note: str = "") -> None:
        """`n` more units are done; `note` stands behind the count."""
        self.done += n
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif not self.disable and time.monotonic() - self.spoke >= PROGRESS_SECONDS:
            self.spoke = time.monotonic()
            of_all = "" if self.total is None else f" of {self.about}{self.total:,}"
            parts = [f"{self.what}: {self.done:,}{of_all} {self.unit}s", self._pace(), note]
            say(", ".join(filter(None, parts)), error=True)

    def _pace(self) -> str:
        """How long is left, or how fast it goes; nothing where nothing can be said yet."""
        n, seconds = self.done - self.before, time.monotonic() - self.began
        if n <= 0 or seconds <= 0 or (self.total is not None and self.total <= self.done):
            return ""
        if self.total is None:
            return f"{n / seconds:,.3g} a second" if n / seconds < 100 else f"{n / seconds:,.0f} a second"
        return f"about {duration((self.total - self.done) * seconds / n)} left"
