"""The report of a step compiled ahead of time, for people and as JSON."""

import dataclasses
from typing import Any

from launch.ahead.compilation import Compiled, Memory, TooLarge
from launch.ahead.fitting import Fit, Mesh, mesh_name
from launch.experiment import Experiment
from launch.timing import table
from qat.training.census import Census, Dots
from qat.training.devices import Device, peak

_DTYPES = {"bf16": "bfloat16", "f16": "float16", "s8": "int8", "u8": "int8"}
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Report:
    """A step on a slice, and what became of it.

    Attributes:
        experiment: the config.
        topology: the slice.
        mesh: devices by mesh axis.
        device_kind: as JAX calls it.
        device: its limits; None is unknown.
        outcome: the compiled step, or by how much it does not fit.
        fast: the compiler took less trouble.
        fit: where it fits instead, if looked for and found.
    """

    experiment: Experiment
    topology: str
    mesh: Mesh
    device_kind: str
    device: Device | None
    outcome: Compiled | TooLarge
    fast: bool
    fit: Fit | None = None

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.mesh["data"] * self.mesh["fsdp"] * self.mesh["tensor"]

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.experiment.tokens_at(1)

    @property
    def analytic_flops(self) -> int:
        """Of a step on all devices, without what is computed twice."""
        return self.experiment.train_flops(self.tokens)

    @property
    def ideal_seconds(self) -> float | None:
        """Of a step whose every product runs at the peak of bfloat16."""
        if self.device is None:
            return None
        return self.analytic_flops / self.devices / self.device.bfloat16


def as_text(report: Report) -> str:
    """The report, for people."""
    experiment, outcome = report.experiment, report.outcome
    lines = [
        f"{report.topology}: {report.devices} devices {report.device_kind!r}, "
        f"mesh {mesh_name(report.mesh)}",
        f"policy {experiment.policy}: {experiment.policy.description or 'nothing quantized'}",
        f"N = {experiment.model.params:,}, {report.tokens:,} tokens a step; compiled in "
        f"{outcome.seconds:.0f} s{' with --fast' if report.fast else ''}",
        "",
        *_flops_lines(report),
        "",
    ]
    if isinstance(outcome, TooLarge):
        return "\n".join([*lines, *_too_large_lines(report, outcome)])
    parts = (
        _memory_lines(outcome.memory, report.device, report.fast),
        _dots_lines(outcome.census),
        _collectives_lines(outcome.census),
    )
    return "\n".join([*lines, *("\n".join([*part, ""]) for part in parts), "It fits."])


def as_json(report: Report) -> dict[str, Any]:
    """The report, as plain data: bytes, FLOPs and seconds."""
    outcome = report.outcome
    fits = isinstance(outcome, Compiled)
    result: dict[str, Any] = {
        "config": dict(report.experiment.config),
        "params": report.experiment.model.params,
        "topology": report.topology,
        "mesh": dict(report.mesh),
        "device_kind": report.device_kind,
        "device": report.device and dataclasses.asdict(report.device),
        "fits": fits,
        "fast": report.fast,
        "analytic_flops": report.analytic_flops,
        "ideal_seconds": report.ideal_seconds,
        **dataclasses.asdict(outcome),
    }
    if isinstance(outcome, Compiled):
        result["program_flops_per_device"] = outcome.census.flops
        result["low_precision_share"] = outcome.census.low_precision_share
        result["program_seconds"] = program_seconds(outcome.census, report.device_kind)
    if report.fit is not None:
        result["nearest_fit"] = dataclasses.asdict(report.fit)
    return result


def program_seconds(census: Census, device_kind: str) -> float | None:
    """Of the program's products, each at the peak of its dtype.

    A dtype without a peak of its own runs at that of bfloat16; None is an unknown device.
    """
    plain = peak(device_kind, "bfloat16")
    if plain is None:
        return None
    return sum(dots.flops / (peak(device_kind, _dtype(dots)) or plain) for dots in census.dots)


def _dtype(dots: Dots) -> str:
    """The dtype in which products run, by the name of `qat.training.devices`."""
    if not dots.low_precision:
        return "bfloat16"
    return _DTYPES.get(dots.lhs, "float8_e4m3fn" if dots.lhs.startswith("f8") else "int4")


def _flops_lines(report: Report) -> list[str]:
    share = report.analytic_flops / report.devices
    lines = [f"analytic FLOPs     {report.analytic_flops:.3e} a step, {share:.3e} a device"]
    if report.device is not None and report.ideal_seconds is not None:
        rate = report.device.bfloat16 / 1e12
        lines.append(
            f"ideal step time    {report.ideal_seconds:.3f} s at {rate:.0f} TFLOP/s of bfloat16"
        )
    if isinstance(report.outcome, Compiled):
        census = report.outcome.census
        again = census.flops / share
        lines.append(f"program's FLOPs    {census.flops:.3e} a device, {again:.2f}x the analytic")
        seconds = program_seconds(census, report.device_kind)
        if seconds is not None:
            lines.append(f"program's ideal    {seconds:.3f} s, each product at its dtype's peak")
    return lines


def _too_large_lines(report: Report, outcome: TooLarge) -> list[str]:
    parts = report.experiment.config["accumulation"]
    lines = [
        f"It does not fit: {_gib(outcome.needed)} a device needed, {_gib(outcome.limit)} there.",
        f"--config.accumulation={2 * parts} needs less.",
    ]
    if report.experiment.model.remat != "full":
        lines.append("--config.model.remat=full needs less.")
    if report.fit is None:
        return [*lines, "No mesh of this slice or of a larger one of its kind was found to fit."]
    peak_bytes = report.fit.compiled.memory.peak
    flags = " ".join(f"--config.mesh.{axis}={size}" for axis, size in report.fit.mesh.items())
    return [
        *lines,
        f"Nearest that fits, compiled: {report.fit.topology} with {mesh_name(report.fit.mesh)}, "
        f"{_gib(peak_bytes)} a device:",
        f"  --topology={report.fit.topology} {flags}",
    ]


def _memory_lines(memory: Memory, device: Device | None, fast: bool) -> list[str]:
    doubt = ["not reliable with --fast"] if fast else []
    share = (
        [] if device is None else [f"{memory.peak / device.memory:.0%} of {_gib(device.memory)}"]
    )
    rows = [
        ("arguments", memory.arguments, []),
        ("outputs", memory.outputs, [f"{_gib(memory.aliased)} of them in place of arguments"]),
        ("temporaries", memory.temporaries, doubt),
        ("program", memory.program, []),
        ("peak", memory.peak, [*share, *doubt]),
    ]
    head, rule, *lines = _table(
        ["memory of a device", ""], [[name, _gib(size)] for name, size, _ in rows]
    )
    noted = [
        f"{line}  {', '.join(notes)}".rstrip()
        for line, (_, _, notes) in zip(lines, rows, strict=True)
    ]
    return [head, rule, *noted]


def _dots_lines(census: Census) -> list[str]:
    rows = [
        [
            f"{dots.lhs} × {dots.rhs}",
            f"{dots.count:,}",
            f"{dots.flops:.3e}",
            f"{dots.flops / census.flops:.1%}",
        ]
        for dots in census.dots
    ]
    lines = _table(["matrix products", "count", "FLOPs a device", "share"], rows)
    lines.append(f"at most 8 bits: {census.low_precision_share:.1%} of the FLOPs")
    if census.unknown_loops:
        loops = ", ".join(census.unknown_loops)
        lines.append(f"counted once, since their turns are not known: {loops}")
    return lines


def _collectives_lines(census: Census) -> list[str]:
    rows = [
        [each.kind, f"{each.group}", f"{each.count:,}", _gib(each.payload)]
        for each in census.collectives
    ]
    return _table(["collectives", "devices", "count", "payload"], rows) if rows else []


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return table(head, rows, 1).splitlines()


def _gib(size: float) -> str:
    """Bytes in the unit that shows them."""
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 100 else f"{size / 2**20:.2f} MiB"
