"""One worker as its requests see it: the envs, its rows of the slab, and who does what.

The same object serves behind a socket in a process of its own, and in the parent's process for
`num_workers=0`: requests in, replies out, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aiovec.exchange.actions import ActionColumns, ActionReader
from aiovec.exchange.groups import EVERY_ENV, rows_of_group
from aiovec.exchange.layout import Layout
from aiovec.exchange.messages import (
    BatchReply,
    BuildReply,
    BuildRequest,
    CallReply,
    CallRequest,
    MapRequest,
    ResetRequest,
    SetAttrRequest,
)
from aiovec.exchange.slab import Geometry, Slab
from aiovec.exchange.step_each import StepEachRequest
from aiovec.worker.clock import StepClock
from aiovec.worker.host import Capture, EnvHost, Work
from aiovec.worker.rows import RowWriter
from aiovec.worker.turns import Doing

__all__ = ["WorkerCore"]

_HOME = 0

Actions = Sequence[Any] | ActionColumns


class _Place(NamedTuple):
    """What a request is about: some rows, where their actions are, and where they write."""

    group: range | None  # all rows
    actions: ActionReader
    writer: RowWriter


class WorkerCore:
    """A worker without its connection.

    Args:
        capture: Turns an env's exception into what a reply bears.
        slab: Gives the shared memory once its geometry is known.
        doing: See `EnvHost`.
        clock: See `EnvHost`.
    """

    def __init__(self, capture: Capture, slab: Callable[[Geometry], Slab], doing: Doing, clock: StepClock) -> None:
        self._capture = capture
        self._doing = doing
        self._clock = clock
        self._make_slab = slab
        self._host: EnvHost | None = None
        self._slab: Slab | None = None
        self._shared = True
        self._rows = range(0)  # of the slab
        self._places: dict[tuple[int, int], _Place] = {}  # by buffer and group, as they are first asked for
        self._moving: dict[tuple[int, int], _Place] = {}  # of the strips of rollouts, by first buffer and group

    @property
    def host(self) -> EnvHost:
        """The envs; there once `build` was asked."""
        assert self._host is not None  # noqa: S101  the parent's order of requests, not a user's mistake
        return self._host

    @property
    def env_ids(self) -> range:
        """The envs of this worker; none before `build` was asked."""
        return self._host.env_ids if self._host is not None else range(0)

    def build(self, request: BuildRequest) -> Work[BuildReply]:
        """Builds the envs."""
        self._host = EnvHost(request, self._capture, self._doing, self._clock)
        return self._host.building()

    def rebuild(
        self, request: BuildRequest, delay: float, lost: Sequence[int], asynchronous: Sequence[int]
    ) -> Work[None]:
        """Builds the envs in place of a worker that died; see `RebuildRequest`."""
        self._host = EnvHost(request, self._capture, self._doing, self._clock)
        return self._host.rebuilding(delay, lost, asynchronous)

    def map(self, request: MapRequest) -> Slab:
        """Maps the slab and prepares the views that every step uses."""
        observations, actions = Layout(request.observation_space), Layout(request.action_space)
        ids = self.host.env_ids
        self._shared = request.shared
        if request.shared:
            geometry = Geometry(request.num_envs, observations, actions, request.num_workers)
            self._slab, self._rows = self._make_slab(geometry), ids
        else:
            self._slab = Slab.private(Geometry(len(ids), observations, actions))
            self._rows = range(len(ids))
        self._places.clear()
        self._moving.clear()
        self.host.set_dynamic_columns(_dynamic_columns(observations) if observations.dynamic else None)
        return self._slab

    @property
    def slab(self) -> Slab:
        """The memory; there once `map` was asked."""
        assert self._slab is not None  # noqa: S101
        return self._slab

    def step(self, buffer: int, group: int, actions: Actions | None) -> BatchReply | None:
        """Steps every env, or those of a group, with actions from the slab unless they are given, in this thread."""
        rows, reader, writer = self._places.get((buffer, group)) or self._moved(buffer, group)
        return self.host.step(reader.rows() if actions is None else self._apart(actions), writer, rows)

    def stepping(self, buffer: int, group: int, actions: Actions | None) -> Work[BatchReply | None]:
        """The same, of envs that do not wait for each other."""
        rows, reader, writer = self._place(buffer, group)
        return self.host.stepping(reader.rows() if actions is None else self._apart(actions), writer, rows)

    def actions_of(self, request: StepEachRequest) -> Sequence[Any]:
        """The actions of a request, from the slab unless they are given."""
        if request.actions is None:
            return self._place(_HOME).actions.rows_of(request.rows)
        return self._apart(request.actions)

    def _apart(self, actions: Actions) -> Sequence[Any]:
        """The actions of a request, one an env."""
        if not isinstance(actions, ActionColumns):
            return actions
        return ActionReader(self.slab.geometry.actions, [array[None] for array in actions.arrays]).rows()

    def stepping_one(self, buffer: int, row: int, action: Any, autoreset: bool) -> Work[BatchReply | None]:
        """Steps one env."""
        return self.host.stepping_one(row, action, self._place(buffer).writer, autoreset)

    def resetting(self, buffer: int, request: ResetRequest) -> Work[BatchReply | None]:
        """Resets some envs."""
        return self.host.resetting(request, self._place(buffer).writer)

    def observing(self, buffer: int) -> Work[BatchReply | None]:
        """Writes the last observations again."""
        return self.host.observing(self._place(buffer).writer)

    def calling(self, request: CallRequest) -> Work[CallReply]:
        """Calls a method of some envs."""
        return self.host.calling(request)

    def setting(self, request: SetAttrRequest) -> Work[CallReply]:
        """Sets an attribute of some envs."""
        return self.host.setting(request)

    def closing(self) -> Work[CallReply]:
        """Closes the envs that were built."""
        work = self._host.closing() if self._host is not None else Work([], lambda: CallReply([], []))

        def reply() -> CallReply:
            self._slab = None  # not before: a step that ends meanwhile is still to be answered
            self._places.clear()
            self._moving.clear()
            return work.reply()

        return Work(work.turns, reply)

    def answered_by(self, request: ResetRequest) -> Sequence[int]:
        """The envs that the answer to a reset is about."""
        return self.env_ids if request.whole_batch or request.rows is None else self.ids_of(request.rows)

    def ids_of_group(self, group: int) -> Sequence[int]:
        """The envs of a group, or all."""
        if group == EVERY_ENV:
            return self.env_ids
        rows = rows_of_group(group, len(self.env_ids))
        return self.env_ids[rows.start : rows.stop]

    def ids_of(self, rows: Sequence[int] | None) -> Sequence[int]:
        """The envs of some rows, or of all."""
        return self.env_ids if rows is None else [self.env_ids[row] for row in rows]

    def rows(self, buffer: int, env_ids: Sequence[int]) -> list[Any]:
        """The rows of some envs of a buffer, to be sent where no memory is shared."""
        arrays = self._place(buffer).writer.arrays()
        if env_ids == self.env_ids:  # the usual case: all of them
            return [array.copy() for array in arrays]
        rows = [env_index - self.env_ids.start for env_index in env_ids]
        return [array[rows] for array in arrays]

    def _place(self, buffer: int, group: int = EVERY_ENV) -> _Place:
        place = self._places.get((buffer, group))
        if place is None:
            place = self._places[buffer, group] = self._new_place(buffer, group)
        return place

    def _moved(self, buffer: int, group: int) -> _Place:
        """The same for envs that take turns in this thread: the steps of a rollout share one place, which moves."""
        assert self._slab is not None  # noqa: S101
        strip = self._slab.strip_of(buffer).strip
        if strip.num_buffers == 1 or not self._shared:
            return self._place(buffer, group)
        place = self._moving.get((strip.first, group))
        if place is None:
            place = self._moving[strip.first, group] = self._new_place(buffer, group)
        index = buffer - strip.first
        place.actions.move(index - 1)
        place.writer.move(index)
        return place

    def _new_place(self, buffer: int, group: int) -> _Place:
        assert self._slab is not None  # noqa: S101
        buffer = buffer if self._shared else _HOME  # the rows are sent, and the parent knows where they go
        geometry, env_ids = self._slab.geometry, self.host.env_ids
        rows = rows_of_group(group, len(env_ids))
        strip, arrays, _ = self._slab.strip_of(buffer)
        actions, batch = self._slab.actions_for(buffer)
        own = slice(self._rows.start + rows.start, self._rows.start + rows.stop)
        reader = ActionReader(geometry.actions, [array[:, own] for array in actions], batch)
        writer = RowWriter(geometry.observations, arrays, self._rows, env_ids, rows, buffer - strip.first)
        return _Place(None if group == EVERY_ENV else rows, reader, writer)


def _dynamic_columns(layout: Layout) -> Callable[[Sequence[Any]], list[list[Any]]]:
    def column(path: tuple[str | int, ...], observations: Sequence[Any]) -> list[Any]:
        values: list[Any] = []
        for observation in observations:
            value = observation
            for key in path:
                if value is None:  # an env that failed, which is told
                    break
                value = value[key]
            values.append(value)
        return values

    return lambda observations: [column(leaf.path, observations) for leaf in layout.dynamic]
