"""The arrow between rooms and the budgets of files, read from the source."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["qat", "models", "configs", "launch"]  # each may import itself and those before
# The numerics from low to high: each may import those on the lines above its own.
NUMERICS = [
    ["spelling", "pytree"],
    ["grid", "noise", "packing", "labels", "contractions"],
    ["rotation"],
    ["formats"],
    ["quantizer"],
    ["groups"],
    ["groups"],
    ["scales"],
    ["quantization"],
    ["storage", "calibration", "policy"],
    ["native"],
    ["dot_general"],
    ["einsum", "convolution", "transforms"],
    ["nnx", "linen"],
    ["ptq"],
]
BELOW = {
    room: [lower for above in NUMERICS[:i] for lower in above]
    for i, line in enumerate(NUMERICS)
    for room in line
}
# What each room of qat may import, beside itself.
ROOMS = {
    **BELOW,
    "laws": ["spelling"],
    "training": ["spelling"],
    "analysis": [*BELOW, "laws"],
    "sweep": ["spelling", "quantizer", "ptq", "training"],
    "report": ["spelling", "laws", "analysis", "training"],
}
# And what it may import inside a function, when that is called.
LATE = {"quantization": ["storage"]}  # QTensor.pack
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
LIBRARY = [path for path in SOURCES if path.is_relative_to(ROOT / "qat")]
FILES = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]


def tree(path):
    return ast.parse(path.read_text())


def imports(path, late=True):
    """Dotted names of all that a file imports; "from a import b" gives "a.b".

    Wherever in it, or without `late` only what is imported along with the file.
    """
    for node in ast.walk(tree(path)) if late else tree(path).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_in(names):
    return {name.split(".")[1] for name in names if name.startswith("qat.")}


def each(paths):
    names = [str(path.relative_to(ROOT)) for path in paths]
    return pytest.mark.parametrize("path", paths, ids=names)


@each(SOURCES)
def test_imports_point_down_the_floors(path):
    floor = path.relative_to(ROOT).parts[0]
    imported = {name.split(".")[0] for name in imports(path)}
    allowed = FLOORS[: FLOORS.index(floor) + 1]
    assert imported & {*FLOORS, "tests"} <= set(allowed)


@each([path for path in LIBRARY if path != ROOT / "qat" / "__init__.py"])
def test_imports_inside_qat_point_down_the_rooms(path):
    room = path.relative_to(ROOT / "qat").with_suffix("").parts[0]
    assert room in ROOMS, f"qat/{room} is new: say above what it may import"
    assert rooms_in(imports(path, late=False)) <= {room, *ROOMS[room]}
    assert rooms_in(imports(path)) <= {room, *ROOMS[room], *LATE.get(room, [])}


@each(LIBRARY)
def test_the_library_knows_no_config_library(path):
    assert not [name for name in imports(path) if name.split(".")[0] in ("ml_collections", "absl")]


def test_only_the_library_ships():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"] == {"include": ["qat", "qat.*"]}


@each(SOURCES)
def test_a_module_says_what_it_is(path):
    assert ast.get_docstring(tree(path))


@each(FILES)
def test_functions_are_at_most_80_lines(path):
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef)]
    assert not {f.name: f.lineno for f in functions if f.end_lineno - f.lineno >= 80}


def test_nine_files_in_ten_are_under_400_lines():
    long = [path for path in FILES if len(path.read_text().splitlines()) >= 400]
    assert len(long) <= len(FILES) / 10, long
