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
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from launch import cpu

BAD_INPUT = 2
DIVERGED = 3
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h
STOPPED = 130  # what a shell reports for Ctrl-C

_OF_WRITING = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNKNOWN_KEY = re.compile(r"'(\w+)'(?:\nDid you mean \"(\w+)\".*)?")
_LEAVING = {signal.SIGTERM: ("preempted", PREEMPTED), signal.SIGINT: ("stopped", STOPPED)}
_REFUSED_FLAG = re.compile(r"flag --(\w+)=(.*?): .*", re.DOTALL)
_KINDS = {flags.IntegerParser: "a whole number", flags.FloatParser: "a number"}
_SHOW_CURSOR = b"\x1b[?25h"  # which progress bars hide


class StoppedError(Exception):
    """SIGTERM or Ctrl-C came, and what was to be saved is."""


def run(
    main: Callable[[list[str]], int | None],
    required: Sequence[str] = (),
    config: Path | None = None,
    keep_freed: bool = True,
) -> None:
    """Parses flags, runs `main`, and turns bad input into one line on standard error.

    Args:
        main: takes the arguments that are not flags; returns the exit code, None for 0.
        required: flags that must be given.
        config: what --config is if it is not given. A default of the flag itself would be read
            before errors become lines.
        keep_freed: whether to keep freed memory for the next step, which is the same as the last;
            arrays of many sizes would be in pieces, and the process several times as large.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: _leave(number))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
        signal.signal(signal.SIGINT, lambda number, frame: _leave(number))
    logging.set_verbosity(logging.FATAL)  # errors are raised, and told in one line
    if keep_freed:
        cpu.keep_freed_memory()
    app.run(
        lambda argv: _guarded(main, argv),
        flags_parser=lambda argv: _parse_flags(_with_config(argv, config), required),
    )


@contextlib.contextmanager
def stopping(ask: Callable[[], None]) -> Iterator[None]:
    """Within, SIGTERM and Ctrl-C ask the program to end by itself; a second time they end it.

    Args:
        ask: called amid anything in the main thread, so it may only leave a message.

    Raises:
        StoppedError: at the end of the context, if one came.
    """
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        if heard:
            _leave(number)
        heard.append(number)
        ask()

    numbers = [each for each in _LEAVING if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if heard:
        raise StoppedError(heard[0])


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
        raise ValueError(_unreadable(Path(path))) from None
    return config


def _guarded(main: Callable[[list[str]], int | None], argv: list[str]) -> int | None:
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}: this program takes --flags only")
    try:
        return main(argv)
    except StoppedError as stopped:
        _leave(stopped.args[0])
    except OSError as error:
        _fail(_told(error))
    except ValueError as error:
        _fail(str(error))


def _told(error: OSError) -> str:
    """What the operating system refuses, and of which file; the message of one that is ours."""
    path = error.filename2 or error.filename
    if error.strerror is None or path is None:
        return error.strerror or str(error)
    return f"cannot {'write' if error.errno in _OF_WRITING else 'use'} {path}: {error.strerror}"


def _leave(number: int) -> NoReturn:
    """Ends at once by a signal, wherever the program is.

    Whatever it was writing appears whole or not at all.

    An exception instead could be lost in code that imports or calls back.
    """
    word, code = _LEAVING[signal.Signals(number)]
    with contextlib.suppress(RuntimeError):  # the signal came amid a print
        sys.stdout.flush()
    if sys.stdout.isatty():
        os.write(1, _SHOW_CURSOR)
    os.write(2, f"{word}; the same command goes on from here\n".encode())
    os._exit(code)


def _with_config(argv: list[str], config: Path | None) -> list[str]:
    """The command line with a config file in it, if there is one to be."""
    names = [word.lstrip("-").partition("=")[0] for word in argv[1:] if word.startswith("-")]
    if config is None or "config" in names:
        return argv
    return [argv[0], f"--config={config}", *argv[1:]]


def _parse_flags(argv: list[str], required: Sequence[str]) -> list[str]:
    try:
        rest: list[str] = flags.FLAGS(argv)
    except flags.Error as error:
        _fail(_refused_flag(str(error)))
    except OSError:
        _fail(_unreadable(_config_of(argv)))
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError, ImportError) as error:
        # What ml_collections raises for an unknown key, a value of another type or a broken file.
        _fail(f"config: {_refused(error)}")
    for name in required:
        if flags.FLAGS[name].value is None:
            _fail(f"--{name} is required")
    return rest


def _refused_flag(message: str) -> str:
    """What absl says of a flag's value, with what was expected and the nearest."""
    found = _REFUSED_FLAG.fullmatch(message)
    if found is None:
        return message
    from qat.spelling import expected_instead, expected_one_of  # takes JAX along

    name, value = found.groups()
    parser = flags.FLAGS[name].parser
    if isinstance(parser, flags.EnumParser):
        return expected_one_of(f"--{name}", value, parser.enum_values)
    if "invalid literal" in message or "could not convert" in message:
        return expected_instead(f"--{name}", _KINDS[type(parser)], value)
    return message


def _refused(error: Exception) -> str:
    """The reason in an error of ml_collections, which may hold another."""
    reason = error.args[0]
    while isinstance(reason, KeyError):
        reason = reason.args[0]
    key = _UNKNOWN_KEY.fullmatch(str(reason))
    if key is None:
        return str(reason)
    return f"there is no key {key[1]!r}" + (f"; nearest is {key[2]!r}" if key[2] else "")


def _config_of(argv: Sequence[str]) -> Path:
    """The config file of a command line; the flag does not know it before all is parsed."""
    words = [word for argument in argv for word in argument.split("=", 1)]
    return Path(words[[word.lstrip("-") for word in words].index("config") + 1])


def _unreadable(path: Path) -> str:
    """Of a config file: what was expected, and the file beside it with the most similar name."""
    from qat.spelling import nearest  # takes JAX along

    message = f"config file {str(path)!r} cannot be read: expected a Python file with get_config()"
    beside = [str(other) for other in sorted(path.parent.glob("*.py")) if other != path]
    return f"{message}; nearest is {nearest(path, beside)!r}" if beside else message


def _fail(reason: str) -> NoReturn:
    line = " ".join(reason.split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(BAD_INPUT)
