"""Sinks that need a library: TensorBoard, Weights & Biases, Comet. Each is imported when its sink is made."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.files import file_to_write
from partita.monitor.records import Record, events_of

if TYPE_CHECKING:
    from partita.config import Config


class TensorBoardSink:
    """An event file for TensorBoard; the x axis is the number of samples.

    Raises:
        OSError: the folder cannot be made or written.
    """

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._session, self._summary = Event, SessionLog, Summary
        folder = Path(os.path.abspath(folder))
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = file_to_write(folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._file.flush()

    def go_on_from(self, step: int, samples: int) -> None:
        """TensorBoard does not show what is there of later samples."""
        start = self._session(status=self._session.START)
        self._add(self._event(step=samples + 1, wall_time=time.time(), session_log=start))

    def write(self, records: Sequence[Record]) -> None:
        """One event for each record, with all its values."""
        for record in records:
            values = [self._summary.Value(tag=tag, simple_value=v) for tag, v in events_of(record).items()]
            summary = self._summary(value=values)
            self._add(self._event(step=record.samples, wall_time=record.time_s, summary=summary))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())


class WandbSink:
    """A run of Weights & Biases. The x axis is the number of samples, which never falls in one run."""

    name = "wandb"

    def __init__(self, config: Config) -> None:
        import wandb

        about = config.wandb
        self._run = wandb.init(project=about.project, group=about.group, entity=about.team)

    def go_on_from(self, step: int, samples: int) -> None:
        """The service keeps what it has, and leaves out values of samples that it has already."""

    def write(self, records: Sequence[Record]) -> None:
        """Hands them to the library's own process."""
        for record in records:
            self._run.log(events_of(record), step=record.samples)

    def close(self) -> None:
        """Waits until the library has sent what it has."""
        self._run.finish()


class CometSink:
    """An experiment of Comet. A value is sent when `samples_log_interval` samples have passed since its last."""

    name = "comet"

    def __init__(self, config: Config) -> None:
        import comet_ml

        about = config.comet
        given: Mapping[str, Any] = {
            name: getattr(about, name)
            for name in ("api_key", "project", "workspace", "experiment_key", "mode", "online")
            if getattr(about, name) is not None
        }
        self._experiment = comet_ml.start(**given)
        if about.experiment_name is not None:
            self._experiment.set_name(about.experiment_name)
        self._interval = about.samples_log_interval
        self._sent: dict[str, int] = {}  # the samples at which a value was sent last

    def go_on_from(self, step: int, samples: int) -> None:
        """The service keeps what it has."""
        self._sent.clear()

    def write(self, records: Sequence[Record]) -> None:
        """Hands those that are due to the library's own threads."""
        for record in records:
            due = {
                name: value
                for name, value in events_of(record).items()
                if not record.is_own or record.samples - self._sent.get(name, -self._interval) >= self._interval
            }
            self._sent |= dict.fromkeys(due, record.samples)
            if due:
                self._experiment.log_metrics(due, step=record.samples)

    def close(self) -> None:
        """Waits until the library has sent what it has."""
        self._experiment.end()
