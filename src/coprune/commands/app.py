"""The `coprune` command: options before a subcommand, and errors as one message. No logic.

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
from coprune.commands.command_table import Commands, option_of_another
from coprune.commands.grouped import WIDEST
from coprune.commands.terminal import tell
from coprune.recipe.flags import CommandLine, with_dashes

app = typer.Typer(
    name="coprune",
    cls=Commands,
    help="Prune large language models after training, measure the effect, and save a checkpoint that others can load.",
    epilog="Try: coprune demo. Every command has --help.",
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
    """Run the command line; report a known error as one message on standard error and exit with 2.

    A command may exit with its own code, for example when a requirement is not met.
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
    if code == INTERRUPTED or stop.number is not None:  # even if a library swallowed the interrupt
        tell(f"coprune: {how_to_resume(sys.argv[1:])}")
        code = stop.code
    if code:
        sys.exit(code)


def _run(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    face = CommandLine(arguments[0])
    try:
        # Not standalone, since typer would spread a usage error over several lines and answer Ctrl-C with silence.
        with speaking(face):
            require_posix()
            code: int = app(arguments, standalone_mode=False, obj=time.monotonic()) or 0
            if sys.stdout is not None:  # None if the parent process closed it
                sys.stdout.flush()
            return code
    except CopruneError as error:
        _fail(error.text(face))
    except _UsageError as error:
        if (other := option_of_another(getattr(error, "option_name", ""), arguments[0])) is not None:
            _fail(other.text(face))
        # Match the style of coprune's own errors.
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
        _fail(f"{first_line_of(error)}. Half precision, a smaller batch or a shorter sequence length needs less.")
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BaseException as error:
        if not is_panic(error):
            raise
        _fail(f"a library crashed on one of its input files, such as the model's tokenizer.json: {error}.")


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
        """None until a signal arrives."""

    @property
    def code(self) -> int:
        """The exit code of a command that was stopped."""
        return INTERRUPTED if self.number is None else 128 + self.number

    def take(self, number: int, frame: object) -> None:
        """Handle a signal by stopping the command."""
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        self.number = number
        signal.signal(signal.SIGALRM, self._insist)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS, _AGAIN_SECONDS)
        sys.unraisablehook = _say_unless_stopped
        raise KeyboardInterrupt

    def _insist(self, number: int, frame: object) -> None:
        """Raise again if a library swallowed the first one: in a C callback, a finaliser or a bare `except`."""
        error = sys.exc_info()[1]
        while error is not None:
            if isinstance(error, KeyboardInterrupt):
                return  # clean-up is already under way
            error = error.__context__
        raise KeyboardInterrupt


def _say_unless_stopped(swallowed: sys.UnraisableHookArgs) -> None:
    """Report an exception swallowed by a callback or finaliser, except the stop, which is raised again a second later."""
    if not issubclass(swallowed.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(swallowed)


@contextmanager
def stopped_alike(stop: Stop) -> Iterator[None]:
    """Stop the body on SIGTERM and Ctrl-C, even if a library swallows the exception. stop: records the signal.

    With several processes, end this one with a message instead: the launcher ends all of them when one is lost, and this one
    may be in a call that no signal handler can interrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not _is_alone():
        _end_when_told()
        yield
        return
    # Shells start background jobs with Ctrl-C ignored; keep it that way.
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
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # a handler is needed for the wakeup fd to be written

    def wait() -> None:
        while signal.SIGTERM not in os.read(hear, 1):
            pass
        tell(
            f"coprune: process {rank()} was told to stop, as all are when one ends. "
            "Run the same command again to resume."
        )
        os._exit(TERMINATED)

    threading.Thread(target=wait, daemon=True).start()


def _is_alone() -> bool:
    try:
        return world_size() == 1
    except BadInput:  # reported by the command itself
        return True


def how_to_resume(arguments: Sequence[str]) -> str:
    """Return the message for a stopped command. arguments: what was typed after `coprune`."""
    said = "stopped; nothing half-written was left under its final name."
    if not arguments or arguments[0] not in _GOES_ON:
        return said
    if not _is_alone():
        return f"{said} Run the same command again to resume."
    return f"{said} To resume, type: coprune {shlex.join(arguments)}"
