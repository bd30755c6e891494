"""How every program starts and ends: bad input gives one line, and an exit code says the rest.

0    done
2    bad input, or a file that cannot be read or written; one line on standard error says which
3    done, and a run diverged; its row says so
75   preempted (SIGTERM): run the same command again
130  stopped by Ctrl-C; the same command goes on too

Nothing heavy is imported here, so that a misspelt flag is answered at once and Ctrl-C is heard from
the start; programs may import what takes seconds inside their `main`.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from launch import cpu

BAD_INPUT = 2
DIVERGED = 3
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h
STOPPED = 130  # what a shell reports for Ctrl-C

_SHOW_CURSOR = b"\x1b[?25h"  # which progress bars hide


def run(main: Callable[[list[str]], int | None], required: Sequence[str] = ()) -> None:
    """Parses flags, runs `main`, and turns bad input into one line on standard error.

    Args:
        main: takes the arguments that are not flags; returns the exit code, None for 0.
        required: flags that must be given.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: _leave("preempted", PREEMPTED))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
        signal.signal(signal.SIGINT, lambda number, frame: _leave("stopped", STOPPED))
    logging.set_verbosity(logging.FATAL)  # errors are raised, and told in one line
    cpu.keep_freed_memory()
    for name in required:
        flags.mark_flag_as_required(name)
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse_flags)


def read_config(name: str = "config") -> dict[str, Any]:
    """The config of a `DEFINE_config_file` flag, overrides included, as a plain nested dict.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        value: Any = flags.FLAGS[name].value
        config: dict[str, Any] = value.to_dict()
    except OSError:
        path = config_flags.get_config_filename(flags.FLAGS[name])
        raise ValueError(
            f"config file {path!r} cannot be read: expected a Python file with get_config()"
        ) from None
    return config


def _guarded(main: Callable[[list[str]], int | None], argv: list[str]) -> int | None:
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}: this program takes --flags only")
    try:
        return main(argv)
    except (ValueError, OSError) as error:
        _fail(str(error))


def _leave(word: str, code: int) -> NoReturn:
    """Ends at once, wherever the program is: whatever it was writing appears whole or not at all.

    An exception instead could be lost in code that imports or calls back.
    """
    with contextlib.suppress(RuntimeError):  # the signal came amid a print
        sys.stdout.flush()
    if sys.stdout.isatty():
        os.write(1, _SHOW_CURSOR)
    os.write(2, f"{word}; the same command goes on from here\n".encode())
    os._exit(code)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest: list[str] = flags.FLAGS(argv)
    except flags.Error as error:
        _fail(str(error))
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
        SyntaxError,
        ImportError,
    ) as error:
        # What ml_collections raises for an unknown key, a value of another type or a broken file.
        reason = str(error.args[0]).replace("\\n", " ").replace("'", "").replace("\\", "")
        _fail(f"config: {reason}")
    return rest


def _fail(reason: str) -> NoReturn:
    line = " ".join(reason.split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(BAD_INPUT)
