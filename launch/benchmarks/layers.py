"""The suite "layers": what quantized layers cost in time, compiles and memory, beside Qwix and AQT.

All programs of a model are compiled first, each with JAX's caches emptied, and then take turns
(see `launch.timing`). A ratio compares with the plain model of the same API of Flax.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from launch import timing
from launch.benchmarks.contenders import (
    COUNTED_BITS,
    ONLY,
    OURS,
    PLAIN,
    SCHEMES,
    Apply,
    Contender,
    Library,
    MissingSchemeError,
)
from launch.benchmarks.models import WORKLOADS, Workload
from launch.benchmarks.others import AQT, QWIX
from launch.progress import Meter

LIBRARIES = (OURS, QWIX, AQT)
LEARNING_RATE = 1e-3
_NOT_INSTALLED = "not installed; pip install '.[bench]'"
_COUNTED = f"int{COUNTED_BITS[0]} to int{COUNTED_BITS[-1]}"

Row = dict[str, Any]
State = tuple[Any, jax.Array]  # parameters and the number of the step


@dataclasses.dataclass
class _Entry:
    """A line of the table on its way.

    Attributes:
        row: what is known so far; "note" says why something is not.
        plain: name of the plain library to compare with.
        contender: the model; None if the library cannot make it.
        programs: what to time, "forward" and "step"; empty if the model cannot run.
    """

    row: Row
    plain: str
    contender: Contender | None = None
    programs: dict[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)


def run(models: Sequence[str], schemes: Sequence[str], rounds: int) -> list[Row]:
    """Measures and prints.

    Args:
        models: names in `WORKLOADS`.
        schemes: names in `SCHEMES`.
        rounds: how often each program is timed.

    Returns:
        A row for each model, library and scheme, and one for the compiles of each library.
    """
    rows: list[Row] = []
    for model in models:
        workload = WORKLOADS[model]
        entries = _build_all(workload, schemes)
        _compile_all(workload, entries)
        for program in ("forward", "step"):
            _time(entries, program, f"{model}: timing {program}", rounds)
        with Meter(f"{model}: counting compiles", len(LIBRARIES), "libraries") as meter:
            counts = []
            for library in LIBRARIES:
                counts.append(_count_compiles(workload, library))
                meter.advance(1)
        timed = [entry.row for entry in entries]
        print(f"\n{model}: {workload.description}; {rounds} rounds\n\n{_table(timed)}\n")
        print(f"{_counts_table(counts)}\n", flush=True)
        rows += [*timed, *counts]
    _print_legend(rows, schemes)
    return rows


@functools.partial(jax.jit, static_argnums=0)
def forward(apply: Apply, params: Any, constants: Any, inputs: jax.Array) -> jax.Array:
    """Outputs of a model."""
    return apply(params, constants, jax.random.key(0), inputs)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
    apply: Apply,
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    state: State,
    constants: Any,
    batch: tuple[jax.Array, jax.Array],
) -> tuple[State, jax.Array]:
    """One step of gradient descent, with a noise key of its own; the old state is consumed."""
    params, count = state
    key = jax.random.fold_in(jax.random.key(0), count)

    def objective(params: Any) -> jax.Array:
        return loss(apply(params, constants, key, batch[0]), batch[1])

    value, gradients = jax.value_and_grad(objective)(params)
    optimizer = optax.sgd(LEARNING_RATE)
    updates, _ = optimizer.update(gradients, optimizer.init(params))
    return (optax.apply_updates(params, updates), count + 1), value


def _build_all(workload: Workload, schemes: Sequence[str]) -> list[_Entry]:
    """Every line of a model's table, with its model or with the reason why it has none."""
    entries, builds = [], []
    for name, plain in PLAIN.items():
        entries.append(_Entry(_new_row(workload, name, "plain"), name))
        builds.append(functools.partial(plain, workload))
    for scheme in schemes:
        for library in LIBRARIES:
            if ONLY.get(scheme, library.name) == library.name:
                entry = _Entry(_new_row(workload, library.name, scheme), library.plain)
                entry.row["note"] = "" if library.installed else _NOT_INSTALLED
                entries.append(entry)
                builds.append(functools.partial(library.build, workload, scheme))
    with Meter(f"{workload.name}: building", len(entries), "models") as meter:
        for entry, build in zip(entries, builds, strict=True):
            if not entry.row["note"]:
                _attempt(entry.row, functools.partial(_build, entry, build))
            meter.advance(1)
    return entries


def _build(entry: _Entry, build: Callable[[], Contender]) -> None:
    entry.contender = build()
    entry.row["weight_bytes"] = entry.contender.weight_bytes()


def _compile_all(workload: Workload, entries: Sequence[_Entry]) -> None:
    """Adds the programs of every model that can run."""
    _compile(dataclasses.replace(entries[0], row={}), workload)  # the compiler's own start
    with Meter(f"{workload.name}: compiling", len(entries), "models") as meter:
        for entry in entries:
            if entry.contender is not None:
                _attempt(entry.row, functools.partial(_compile, entry, workload))
            meter.advance(1)


def _compile(entry: _Entry, workload: Workload) -> None:
    """Compiles a model's programs and takes the first step."""
    assert entry.contender is not None
    apply, params, constants = (
        entry.contender.apply,
        entry.contender.params,
        entry.contender.constants,
    )
    state, batch = _first_state(params), workload.batch()
    jax.clear_caches()  # or the second model of a kind would be traced faster than the first
    start = time.perf_counter()
    step = train_step.lower(apply, workload.loss, state, constants, batch).compile()
    entry.row["compile_s"] = time.perf_counter() - start
    outputs = forward.lower(apply, params, constants, batch[0]).compile()

    def take_step() -> Any:
        nonlocal state
        state, loss = step(state, constants, batch)
        return state, loss

    entry.row["first_loss"] = float(take_step()[1])
    entry.programs = {
        "forward": lambda: outputs(params, constants, batch[0]),
        "step": take_step,
    }


def _first_state(params: Any) -> State:
    """A state that a step may consume."""
    return jax.tree.map(jnp.copy, params), jnp.uint32(0)


def _new_row(workload: Workload, library: str, scheme: str) -> Row:
    return {"model": workload.name, "library": library, "scheme": scheme, "note": ""}


def _attempt(row: Row, action: Callable[[], None]) -> None:
    """Runs what may be foreign code; an error becomes the row's note."""
    try:
        action()
    except MissingSchemeError as error:
        row["note"] = str(error)
    except Exception as error:  # whatever a library may raise
        lines = str(error).strip().splitlines() or [""]
        row["note"] = f"{type(error).__name__}: {lines[0]}"


def _time(entries: Iterable[_Entry], program: str, title: str, rounds: int) -> None:
    """Times one program of every entry in turn; adds milliseconds and ratios to the rows."""
    running = [entry for entry in entries if entry.programs]
    with Meter(title, rounds, "rounds") as meter:
        calls = [entry.programs[program] for entry in running]
        seconds_RP = timing.take_turns(calls, rounds, on_round=lambda: meter.advance(1))
    plain = {
        entry.plain: seconds_R
        for entry, seconds_R in zip(running, seconds_RP.T, strict=True)
        if entry.row["scheme"] == "plain"
    }
    for entry, seconds_R in zip(running, seconds_RP.T, strict=True):
        ratio = timing.ratio(seconds_R, plain[entry.plain])
        entry.row[f"{program}_ms"] = 1e3 * float(np.median(seconds_R))
        entry.row[f"{program}_ratio"] = ratio.median
        entry.row[f"{program}_ratio_low"], entry.row[f"{program}_ratio_high"] = (
            ratio.low,
            ratio.high,
        )


def _count_compiles(workload: Workload, library: Library) -> Row:
    """Trains one step at each width of the weights, one after another."""
    row, batch = _new_row(workload, library.name, _COUNTED), workload.batch()
    if not library.installed:
        return {**row, "note": _NOT_INSTALLED}

    def train() -> None:
        for contender in library.weights_of_bits(workload):
            state, constants = _first_state(contender.params), contender.constants
            start = time.perf_counter()
            jax.block_until_ready(
                train_step(contender.apply, workload.loss, state, constants, batch)
            )
            row["seconds"] = row.get("seconds", 0.0) + time.perf_counter() - start
            row["compiles"] = compiled["train_step"]

    jax.clear_caches()
    with timing.counting_compiles() as compiled:
        _attempt(row, train)
    return row


def _table(rows: Sequence[Row]) -> str:
    """Times and bytes of every scheme."""
    head = (
        "scheme",
        "library",
        "forward / plain",
        "train step / plain",
        "step ms",
        "compile s",
        "weights KiB",
    )
    lines = [
        (
            row["scheme"],
            row["library"],
            _ratio_text(row, "forward"),
            _ratio_text(row, "step"),
            _number(row, "step_ms", ".1f"),
            _number(row, "compile_s", ".2f"),
            _number(row, "weight_bytes", ".1f", 2.0**-10),
        )
        for row in rows
    ]
    return timing.table(head, lines, text_columns=2)


def _counts_table(rows: Sequence[Row]) -> str:
    """Compiles of every library, and the seconds of the steps that needed them."""
    head = ("weights", "library", "compiles", "seconds")
    lines = [
        (row["scheme"], row["library"], _number(row, "compiles", "d"), _number(row, "seconds"))
        for row in rows
    ]
    return timing.table(head, lines, text_columns=2)


def _ratio_text(row: Row, program: str) -> str:
    """A median and its quartiles."""
    name = f"{program}_ratio"
    if name not in row:
        return "-"
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"


def _number(row: Row, name: str, spec: str = ".1f", unit: float = 1) -> str:
    """A number, or "-" where there is none."""
    return format(row[name] * unit, spec) if name in row else "-"


def _print_legend(rows: Sequence[Row], schemes: Sequence[str]) -> None:
    """What the columns and schemes mean, and why something is missing."""
    print("Ratios are medians over rounds [and quartiles] to plain Flax: ours to NNX, others to")
    print("Linen. Compile seconds are those of the train step, traced from scratch.\n")
    for scheme in schemes:
        print(f"  {scheme:<10}  {SCHEMES[scheme]}")
    notes = dict.fromkeys(
        f"{row['library']}"
        + ("" if row["note"] == _NOT_INSTALLED else f", {row['scheme']}")
        + f": {row['note']}"
        for row in rows
        if row["note"]
    )
    if notes:
        print("\nNot measured (-):")
        print("\n".join(f"  {note}" for note in notes))
