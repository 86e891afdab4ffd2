"""The one place that pickles and unpickles.

Parent to worker: cloudpickle, which sends classes and functions of `__main__` by value, since a worker never
imports the parent's `__main__`. Worker to parent: plain pickle, and where that fails a pickler that sends
exceptions with their tracebacks, and classes of the parent's `__main__` by name, so that they arrive as the
very classes that the parent's `except` and `isinstance` know.
"""

from __future__ import annotations

import io
import itertools
import pickle
import sys
from collections import ChainMap
from collections.abc import Generator
from types import CodeType, FrameType, FunctionType, GeneratorType, TracebackType, WrapperDescriptorType
from typing import Any, ClassVar

import cloudpickle
import tblib.pickling_support

__all__ = ["dumps_to_parent", "dumps_to_worker", "dumps_with_tracebacks", "loads", "modules_needed"]

# Of the code that a frame was running: line, last line, column, last column; as `co_positions` gives them.
_Position = tuple[int | None, int | None, int | None, int | None]
# Of one frame: file, function, its qualified name, its first line, line, position, module, module's file.
_FrameFacts = tuple[str, str, str, int, int, _Position, str | None, str | None]

_READ_IN_PIECES_NBYTES = 100_000
_COPIED_NBYTES = 1 << 22

# The classes of the parent's __main__ that this process received by value and sent by name: its own test
# load of an exception finds them here. Empty in the parent.
_main_classes: dict[str, type] = {}


def dumps_to_worker(value: Any) -> bytes:
    """Pickles what a user gave: arguments, options, env_fns."""
    return _dumps(value, _Pickler)


def dumps_to_parent(value: Any) -> bytes:
    """Pickles what an env gave: infos, observations, results of calls."""
    try:
        return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception:  # noqa: BLE001  a class of __main__, a lambda, …: the slower pickler decides
        return dumps_with_tracebacks(value)


def dumps_with_tracebacks(value: Any) -> bytes:
    """Pickles exceptions with their traceback, chain, notes and attributes, wherever they are in `value`."""
    return _dumps(value, _ExceptionPickler)


def _dumps(value: Any, pickler: type[_Pickler]) -> bytes:
    with io.BytesIO() as file:
        pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
        return file.getvalue()


def modules_needed(value: Any) -> set[str]:
    """The modules from which a worker imports functions and classes that `dumps_to_worker` sends by name."""
    with io.BytesIO() as file:
        pickler = _RecordingPickler(file, protocol=pickle.HIGHEST_PROTOCOL)
        pickler.dump(value)
        return pickler.modules


def loads(data: bytes | memoryview) -> Any:
    """The value that any of the functions here pickled."""
    if len(data) < _READ_IN_PIECES_NBYTES:
        return pickle.loads(data)  # noqa: S301  the bytes come from our own process
    return pickle.Unpickler(_Pieces(data)).load()  # noqa: S301  likewise


class _Pieces:
    """A file over bytes, in Python: so another thread gets its turn at each read.

    `pickle.loads` keeps the interpreter's lock to its end, 1.5 s for 2 million small objects, in whichever thread. A
    pickle is read in frames of some 64 KB.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self._position = 0

    def read(self, nbytes: int) -> bytes:
        start, self._position = self._position, self._position + nbytes
        return bytes(self._data[start : self._position])

    def readinto(self, buffer: Any) -> int:
        nbytes = len(buffer)
        for start in range(0, nbytes, _COPIED_NBYTES):
            end = min(start + _COPIED_NBYTES, nbytes)
            buffer[start:end] = self._data[self._position + start : self._position + end]
        self._position += nbytes
        return nbytes

    def readline(self) -> bytes:
        raise pickle.UnpicklingError("a protocol with lines, which is not ours")


_dispatch_table: Any = cloudpickle.Pickler.dispatch_table


def _reduce_code(code: CodeType) -> tuple[Any, ...]:
    # cloudpickle 3.1.3 leaves the file's name out; without it no traceback shows a line of the user's source.
    build, arguments, *_ = _dispatch_table[CodeType](code)
    return _rebuild_code, (build, arguments, code.co_filename)


def _rebuild_code(build: Any, arguments: tuple[Any, ...], filename: str) -> CodeType:
    code: CodeType = build(*arguments)
    return code.replace(co_filename=filename)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no stubs
    dispatch_table: ClassVar[Any] = ChainMap({CodeType: _reduce_code}, _dispatch_table)


class _RecordingPickler(_Pickler):
    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol=protocol)
        self.modules: set[str] = set()

    def reducer_override(self, obj: Any) -> Any:
        reduced = super().reducer_override(obj)
        if reduced is NotImplemented and isinstance(obj, (type, FunctionType)):  # by name
            self.modules.add(obj.__module__)
        return reduced


class _ExceptionPickler(_Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, TracebackType):
            return _rebuild_traceback, (_flat_frames(obj),)
        if isinstance(obj, BaseException):
            # An __init__ written in C takes its own args back, and only so is its state complete.
            init = type(obj).__init__
            in_c = (init,) if isinstance(init, WrapperDescriptorType) else ()
            return tblib.pickling_support.pickle_exception(obj, builtin_inits=in_c)
        if isinstance(obj, type) and obj.__module__ == "__main__" and "<locals>" not in obj.__qualname__:
            _main_classes[obj.__qualname__] = obj
            return _main_class, (obj.__qualname__,)
        return super().reducer_override(obj)


def _main_class(qualname: str) -> type:
    if (known := _main_classes.get(qualname)) is not None:
        return known
    found: Any = sys.modules["__main__"]
    for name in qualname.split("."):
        found = getattr(found, name)
    return found  # type: ignore[no-any-return]


def _flat_frames(traceback: TracebackType) -> list[_FrameFacts]:
    """One item a frame: tblib's own nested form fails on some 900 frames."""
    frames: list[_FrameFacts] = []
    current: TracebackType | None = traceback
    while current is not None:
        code, names = current.tb_frame.f_code, current.tb_frame.f_globals
        positions = itertools.islice(code.co_positions(), current.tb_lasti // 2, None)
        position = next(positions, (None, None, None, None))
        module, file = names.get("__name__"), names.get("__file__")
        function = (code.co_filename, code.co_name, code.co_qualname, code.co_firstlineno)
        frames.append((*function, current.tb_lineno, position, module, file))
        current = current.tb_next
    return frames


def _rebuild_traceback(frames: list[_FrameFacts]) -> TracebackType | None:
    """A traceback that prints as the original: each frame is at the very place in the source."""
    traceback: TracebackType | None = None
    for filename, name, qualname, first_line, lineno, position, module, file in reversed(frames):
        # Else -X no_debug_ranges, or code that no compiler wrote.
        is_place = None not in position and position[::2] <= position[1::2]
        place = position if is_place else (lineno, lineno, 0, 0)
        code = _nowhere.__code__
        frame = _frame_of(
            code.replace(
                co_filename=filename,
                co_name=name,
                co_qualname=qualname,
                co_firstlineno=first_line,
                co_linetable=_line_table(first_line, place, len(code.co_code) // 2),
            )
        )
        known = {"__name__": module, "__file__": file}
        frame.f_globals.update({key: value for key, value in known.items() if value is not None})
        traceback = TracebackType(traceback, frame, 0, lineno)
    return traceback


def _nowhere() -> Generator[None, None, None]:
    yield


def _frame_of(code: CodeType) -> FrameType:
    """The frame of a generator that never runs.

    So no frame of ours is behind it: one that had called it would be kept as long as the exception, with all of its
    variables.
    """
    generator: GeneratorType[None, None, None] = FunctionType(code, {})()
    frame = generator.gi_frame
    assert frame is not None  # noqa: S101  it has not ended
    return frame


def _line_table(first_line: int, place: Any, num_instructions: int) -> bytes:
    """Places all instructions of a function at one place: `Objects/locations.md` of CPython, the long form.

    A compiler would place the first one, where such a frame stands, at the function's first line. Who shows a traceback
    by the frames' own lines, as IPython does for cells, would show that.
    """
    line, end_line, column, end_column = place
    table = bytearray()
    delta = line - first_line
    for begin in range(0, num_instructions, 8):
        table.append(0x80 | 14 << 3 | min(8, num_instructions - begin) - 1)
        for number in (delta << 1 if delta >= 0 else -delta << 1 | 1, end_line - line, column + 1, end_column + 1):
            rest = number
            while rest > 0x3F:
                table.append(0x40 | rest & 0x3F)
                rest >>= 6
            table.append(rest)
        delta = 0
    return bytes(table)
