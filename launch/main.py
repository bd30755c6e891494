"""How every program starts and fails: bad input gives one line and a non-zero exit."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from launch import cpu

BAD_INPUT = 2
STOPPED = 130  # what a shell reports for Ctrl-C


def run(main: Callable[[list[str]], None], required: Sequence[str] = ()) -> None:
    """Parses flags, runs `main`, and turns bad input into one line on standard error.

    Args:
        main: takes the arguments that are not flags.
        required: flags that must be given.
    """
    logging.set_verbosity(logging.ERROR)
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


def _guarded(main: Callable[[list[str]], None], argv: list[str]) -> None:
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}: this program takes --flags only")
    try:
        main(argv)
    except (ValueError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(STOPPED)  # without waiting for runs in other threads, which are repeated anyway


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


def _fail(reason: str) -> None:
    line = " ".join(reason.split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(BAD_INPUT)
