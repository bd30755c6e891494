"""TensorBoard's event files, without TensorFlow.

Written by tensorboardX's `EventsWriter`, which needs protobuf and numpy alone; TensorBoard's own
package brings a web server and gRPC along. It is used directly, without the queue and the thread
that `SummaryWriter` puts before it, so that what was written is in the file when the call returns.

Every process of a run adds a file. It begins at its first point with the mark that TensorBoard
itself writes after a restart: what older files hold from that step on is void, since the run
repeats it.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from qat.training.scalars import Point


class TensorBoard:
    """Writes scalars to a new event file; see `qat.training.scalars.Writer`.

    Args:
        folder: of the run's event files; made if it is missing.

    Raises:
        OSError: the folder cannot be made, or later the file.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._events: Any = None

    def write(self, points: Iterable[Point]) -> None:
        """Appends points to the file."""
        for step, numbers in points:
            if self._events is None:
                self._events = self._begun(step)
            values = [Summary.Value(tag=tag, simple_value=x) for tag, x in numbers.items()]
            event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
            self._events.write_event(event)
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._events is not None:
            self._events.close()

    def _begun(self, step: int) -> Any:
        """A file that voids what older ones hold from a step on."""
        # Names begin with the second and are read in order; the count tells two within one apart.
        count = sum(1 for _ in self._folder.iterdir())
        events = EventsWriter(str(self._folder / "events"), f".{count:05d}")
        restart = SessionLog(status=SessionLog.START)
        events.write_event(Event(wall_time=time.time(), step=step, session_log=restart))
        return events
