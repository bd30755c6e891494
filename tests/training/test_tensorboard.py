"""Event files, read back by a reader written from the file format and the protobuf encoding."""

import struct

import pytest

from qat.training.scalars import Writer
from qat.training.tensorboard import TensorBoard

CASTAGNOLI = 0x82F63B78  # reversed
STARTED = 1  # of a session log's status


def masked_crc(data):
    """The checksum of TFRecord, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (CASTAGNOLI if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(path):
    data = path.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + size]
        checks = struct.unpack("<I", data[8:12]) + struct.unpack("<I", data[12 + size : 16 + size])
        assert checks == (masked_crc(data[:8]), masked_crc(body))
        yield body
        data = data[16 + size :]


def varint(data, at):
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def fields(message):
    """(field number, value) of a protobuf message; fixed-width values as bytes."""
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        if tag & 7 == 0:
            value, at = varint(message, at)
        else:
            size, at = varint(message, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value, at = message[at : at + size], at + size
        yield tag >> 3, value


def read(folder):
    """{tag: {step: value}} of a run as TensorBoard shows it."""
    shown = {}
    for path in sorted(folder.glob("*tfevents*")):
        first, *events = [dict(fields(record)) for record in records(path)]
        assert first[3] == b"brain.Event:2"
        for event in events:
            step = event[2]
            assert struct.unpack("<d", event[1])[0] > 1e9  # wall time
            if 7 in event:
                assert dict(fields(event[7]))[1] == STARTED
                shown = {
                    tag: {s: value for s, value in series.items() if s < step}
                    for tag, series in shown.items()
                }
            for _, value in fields(event.get(5, b"")):
                parts = dict(fields(value))
                tag, number = parts[1].decode(), struct.unpack("<f", parts[2])[0]
                shown.setdefault(tag, {})[step] = number
    return shown


def test_points_are_in_the_file_as_soon_as_they_are_written(tmp_path):
    writer = TensorBoard(tmp_path / "deep" / "folder")
    assert isinstance(writer, Writer)
    writer.write([(1, {"loss": 3.5, "grad_norm": 0.25}), (2, {"loss": 3.0, "step_ms": 12.0})])
    assert read(tmp_path / "deep" / "folder") == {
        "loss": {1: 3.5, 2: 3.0},
        "grad_norm": {1: 0.25},
        "step_ms": {2: 12.0},
    }
    writer.close()


def test_values_that_are_not_finite_are_kept(tmp_path):
    writer = TensorBoard(tmp_path)
    writer.write([(1, {"loss": float("inf")})])
    writer.close()
    assert read(tmp_path) == {"loss": {1: float("inf")}}


@pytest.mark.parametrize(("begin", "kept"), [(3, {1: 1.0, 2: 1.0}), (1, {})])
def test_a_restart_voids_the_steps_that_it_repeats(tmp_path, begin, kept):
    first = TensorBoard(tmp_path)
    first.write([(step, {"loss": 1.0}) for step in (1, 2, 3, 4)])
    first.close()
    second = TensorBoard(tmp_path)
    second.write([(begin, {"loss": 2.0})])
    second.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert read(tmp_path) == {"loss": {**kept, begin: 2.0}}


def test_a_run_without_points_leaves_no_file(tmp_path):
    writer = TensorBoard(tmp_path)
    writer.write([])
    writer.close()
    assert not list(tmp_path.iterdir())
