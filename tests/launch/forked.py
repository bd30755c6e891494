"""Programs in processes of their own, forked from one that has imported what they import.

    python -m tests.launch.forked launch.train launch.training

Importing takes seconds, which every misspelt flag under test would take anew. Imports all modules
but the first, which is the program; reads the program's arguments from standard input, a JSON list
a line, and answers each with a line: exit code, standard output and standard error.
"""

import importlib
import json
import os
import runpy
import sys
import tempfile


def main(program: str, *modules: str) -> None:
    """Answers until standard input ends."""
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        print(json.dumps(run(program, json.loads(line))), flush=True)


def run(program: str, arguments: list[str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.argv[1:] = arguments
            runpy.run_module(program, run_name="__main__", alter_sys=True)
            sys.exit()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), errors.seek(0)
        return code, out.read(), errors.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
