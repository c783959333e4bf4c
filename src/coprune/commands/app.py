"""The command `coprune`: what stands before a command, and errors as one message. No logic.

Nothing heavy is imported before a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from coprune.base.environment import quieten_libraries, rank, require_posix, world_size
from coprune.base.errors import BadInput, CopruneError, is_panic
from coprune.base.words import ended, speaking
from coprune.commands.grouped import WIDEST
from coprune.commands.table import Commands, option_of_another
from coprune.commands.terminal import tell
from coprune.recipe.flags import CommandLine, with_dashes

app = typer.Typer(
    name="coprune",
    cls=Commands,
    help="Prune large language models after training, measure what it did, and save a checkpoint that others can load.",
    epilog="Try: coprune demo. Every command explains itself with --help.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDEST},
)
# Base class of typer's own errors (a missing argument, an invalid number); it has no public name.
_UsageError: Any = typer.BadParameter.__bases__[0]
# Errors that the user can fix; any other system error is a bug that needs its traceback.
_FILE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.EPERM, errno.EIO),
)


def _show_version(asked: bool) -> None:
    if asked:
        import coprune

        typer.echo(f"coprune {coprune.__version__}")
        raise typer.Exit


@app.callback()
def _options_of_coprune(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, show_default=False, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Accept the options that precede a command."""


def main() -> None:
    """Run the command line; a known error is one message on standard error and exit code 2.

    A command may exit with a code of its own, as for an unmet requirement.
    """
    # Libraries' warnings are for developers; coprune itself reports what matters to users.
    quieten_libraries()
    stop = Stop()
    try:
        with stopped_alike(stop):
            code = _run(with_dashes(sys.argv[1:]) or ["--help"])
    except BaseException:
        if stop.number is None:
            raise
        code = INTERRUPTED
    if code == INTERRUPTED or stop.number is not None:  # whatever a library made of it
        tell(f"coprune: {how_to_go_on(sys.argv[1:])}")
        code = stop.code
    if code:
        sys.exit(code)


def _run(arguments: list[str]) -> int:
    """Run what was typed, and return its exit code."""
    face = CommandLine(arguments[0])
    try:
        # Not standalone, since typer would spread a usage error over several lines and answer Ctrl-C with silence.
        with speaking(face):
            require_posix()
            code: int = app(arguments, standalone_mode=False, obj=time.monotonic()) or 0
            if sys.stdout is not None:  # which it is where whoever started this closed it
                sys.stdout.flush()
            return code
    except CopruneError as error:
        _fail(error.text(face))
    except _UsageError as error:
        if (other := option_of_another(getattr(error, "option_name", ""), arguments[0])) is not None:
            _fail(other.text(face))
        # Reported in the style of coprune's own errors.
        said = error.format_message().replace(": Value error, ", ": ").replace(": Input should", ": it should")
        # For a missing argument, also show the usage.
        usage = error.ctx.get_usage().removeprefix("Usage: ") if said.startswith("Missing argument") else ""
        _fail(ended(said.removesuffix(".") + (f"; type {usage}" if usage else "")))
    except BrokenPipeError:
        # The reader closed the pipe, as `| head` does; Python must not complain about that at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # as typer does
    except OSError as error:
        if error.errno not in _FILE_ERRORS:
            raise
        _fail(f"{error.filename or 'a file'} cannot be opened or written: {error.strerror}.")
    except (MemoryError, RuntimeError) as error:
        from coprune.base.devices import first_line_of, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _fail(f"{first_line_of(error)}. Half precision, or a smaller batch or sequence length, takes less.")
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BaseException as error:
        if not is_panic(error):
            raise
        _fail(f"a library failed over a file that it was given, such as the model's tokenizer.json: {error}.")


def _fail(message: str) -> NoReturn:
    """Print one line on standard error and exit with 2."""
    tell(f"coprune: {' '.join(message.split())}")
    sys.exit(2)


if __name__ == "__main__":
    main()


INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
_AGAIN_SECONDS = 1.0
# Commands that resume when repeated.
_GOES_ON = ("prune", "finetune", "fit", "sweep", "compare")


class Stop:
    """The signal that stopped a command: SIGTERM or Ctrl-C's SIGINT."""

    def __init__(self) -> None:
        self.number: int | None = None
        """None without one."""

    @property
    def code(self) -> int:
        """The exit code of a command that was stopped."""
        return INTERRUPTED if self.number is None else 128 + self.number

    def take(self, number: int, frame: object) -> None:
        """Stop the command as the handler of a signal."""
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        self.number = number
        signal.signal(signal.SIGALRM, self._insist)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS, _AGAIN_SECONDS)
        sys.unraisablehook = _say_unless_stopped
        raise KeyboardInterrupt

    def _insist(self, number: int, frame: object) -> None:
        """Raise once more where a library swallowed the first: a callback from C, a finaliser, an `except` for everything."""
        error = sys.exc_info()[1]
        while error is not None:
            if isinstance(error, KeyboardInterrupt):
                return  # somebody is tidying up
            error = error.__context__
        raise KeyboardInterrupt


def _say_unless_stopped(swallowed: sys.UnraisableHookArgs) -> None:
    """Report what a callback or finaliser could not raise, but not the stop: it is raised again a second later."""
    if not issubclass(swallowed.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(swallowed)


@contextmanager
def stopped_alike(stop: Stop) -> Iterator[None]:
    """Make SIGTERM and Ctrl-C stop the body, also where a library swallows what they raise. stop: records the signal.

    Among several processes it ends this one with a line: the launcher ends all when one is lost, and this one may be in a
    call that no signal handler interrupts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not _is_alone():
        _end_when_told()
        yield
        return
    # A shell starts background jobs with Ctrl-C ignored, which stays so.
    taken = [
        signal.SIGTERM,
        *([signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.default_int_handler else []),
    ]
    hook = sys.unraisablehook
    before = {number: signal.signal(number, stop.take) for number in taken}
    try:
        yield
    finally:
        if stop.number is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_when_told() -> None:
    """End this process at SIGTERM from a thread, even inside an uninterruptible call."""
    hear, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # so that Python takes note of it

    def wait() -> None:
        while signal.SIGTERM not in os.read(hear, 1):
            pass
        tell(
            f"coprune: process {rank()} was told to stop, as all are when one of them ended. "
            "The same command goes on where it stopped."
        )
        os._exit(TERMINATED)

    threading.Thread(target=wait, daemon=True).start()


def _is_alone() -> bool:
    try:
        return world_size() == 1
    except BadInput:  # which the command will say
        return True


def how_to_go_on(arguments: Sequence[str]) -> str:
    """Return the message for a stopped command. arguments: those typed after `coprune`."""
    said = "stopped; nothing half-written was left under its final name."
    if not arguments or arguments[0] not in _GOES_ON:
        return said
    if not _is_alone():
        return f"{said} The same command goes on where it stopped."
    return f"{said} To go on, type: coprune {shlex.join(arguments)}"
