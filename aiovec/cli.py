"""The command line: ``aiovec bench ENV_ID`` and ``aiovec doctor``. Arguments, tables and files; the work is elsewhere."""

from __future__ import annotations

import ast
import datetime as dt
import importlib
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import gymnasium as gym
import typer
from gymnasium.vector import AutoresetMode
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from aiovec.benchmark import (
    Contestant,
    EnvTimes,
    Result,
    advice,
    as_text,
    contestants,
    measure_env,
    usual_workers,
    warning,
)
from aiovec.doctor import Finding, examine, package_versions
from aiovec.errors import failures
from aiovec.make import env_maker, find_spec
from aiovec.pool.cpus import usable_cpus

__all__ = ["app"]

_NUM_ROUNDS = 5
_STDOUT = Path("-")
_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}

app: typer.Typer = typer.Typer(
    name="aiovec",
    help="Many reinforcement-learning environments at once, under await.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_errors = Console(stderr=True, soft_wrap=True, highlight=False)


def _can_be_written(path: Path | None) -> Path | None:
    """Told before anything is measured, which takes long."""
    if path is not None and path != _STDOUT:
        if path.is_dir():
            _fail(f"{path}: it is a folder")
        if not path.parent.is_dir():
            _fail(f"{path}: there is no folder {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            _fail(f"{path}: it may not be written")
    return path


def _can_be_drawn(path: Path | None) -> Path | None:
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        _fail("--png needs matplotlib: pip install 'aiovec[cli]'")
    return _can_be_written(path)


def _is_finite(seconds: float) -> float:
    if not math.isfinite(seconds):
        _fail(f"--seconds {seconds}: expected a finite number")
    return seconds


_JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", callback=_can_be_written, help="Write all of it to a file; - for stdout."),
]


# ---- aiovec bench


@app.command()
def bench(
    env_id: Annotated[str, typer.Argument(help="A registered environment, such as CartPole-v1.")],
    num_envs: Annotated[int, typer.Option(min=1, help="How many of it are stepped at once.")] = 64,
    num_workers: Annotated[
        list[str] | None,
        typer.Option(metavar="N[,N…]", help="Which to try, such as 0,1,4. [default: 0, 1, 2, … for this machine]"),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.001, callback=_is_finite, help="How long each contestant steps, in all rounds.")
    ] = 2.0,
    modules: Annotated[
        list[str] | None, typer.Option("--import", help="A module that registers the environment; may be repeated.")
    ] = None,
    env_kwarg: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An argument of the environment; may be repeated.")
    ] = None,
    autoreset_mode: Annotated[AutoresetMode, typer.Option(help="Of all contestants.")] = AutoresetMode.NEXT_STEP,
    gymnasium: Annotated[bool, typer.Option(help="Whether Gymnasium's vectors take part.")] = True,
    json_file: _JsonFile = None,
    png_file: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", callback=_can_be_drawn, help="Draw the speeds.")
    ] = None,
) -> None:
    """Measures which num_workers is the fastest for an environment, beside Gymnasium's own vectors."""
    if autoreset_mode is AutoresetMode.DISABLED:
        _fail("--autoreset-mode Disabled: a benchmark has nobody who resets; take NextStep or SameStep")
    chosen = _numbers("--num-workers", num_workers or [])
    env_kwargs = _env_kwargs(env_kwarg or [])
    _import(modules or [])
    env_fn = _env_fn(env_id, env_kwargs)
    load = os.getloadavg()[0]  # before ours
    console = _console(json_file)
    try:
        # Nowhere here does a thread refresh what is shown: it would run beside what is measured, and be there when
        # Gymnasium forks.
        with Live(f"measuring one {env_id} by itself", console=console, auto_refresh=False, transient=True):
            env = measure_env(env_fn, seconds / _NUM_ROUNDS)
    except Exception as error:  # noqa: BLE001  whatever the env raises is told
        _fail(f"{env_id} fails by itself, {error.__notes__[-1]}: {_told(error)}")
    workers = tuple(dict.fromkeys(min(number, num_envs) for number in chosen)) or usual_workers(num_envs, usable_cpus())
    results: list[Result] = []
    beside_gymnasium = gymnasium and not env.is_async
    with contestants(env_fn, num_envs, workers, autoreset_mode, beside_gymnasium) as everyone:
        results = [contestant.result for contestant in everyone]
        try:
            _compete(console, everyone, seconds, lambda: _bench_table(env_id, num_envs, env, results))
        except KeyboardInterrupt:
            _errors.print("interrupted: what is shown was measured before")
            raise typer.Exit(130) from None
        except Exception as error:  # noqa: BLE001  whatever the env raises is told
            if of_envs := failures(error):  # one stands for all
                first = of_envs[0]
                _fail(f"{env_id} fails in env {first.env_index} during {first.command}: {_told(first.exception)}")
            _fail(f"{env_id} fails: {_told(error)}")
        finally:
            console.print(_bench_table(env_id, num_envs, env, results))
    console.print(advice(env, results), style="bold")
    if because_of_others := warning(load, usable_cpus()):
        console.print(because_of_others)
    if json_file is not None:
        _write(json_file, _bench_record(env_id, num_envs, env_kwargs, autoreset_mode, load, env, results))
    if png_file is not None:
        _draw(png_file, env_id, num_envs, results)


def _compete(console: Console, everyone: Sequence[Contestant], seconds: float, table: Any) -> None:
    """Starts everyone, runs the rounds, and shows how it stands."""
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console, transient=True
    )
    task = progress.add_task("starting", total=len(everyone) * (_NUM_ROUNDS + 2))

    def shown() -> RenderableType:
        return Group(table(), progress)

    with Live(console=console, get_renderable=shown, transient=True, auto_refresh=False) as live:

        def turns(description: str) -> Iterator[Contestant]:
            for contestant in everyone:
                progress.update(task, description=f"{description}: {contestant.result.name}")
                live.refresh()
                yield contestant
                progress.advance(task)

        for contestant in turns("start"):
            contestant.start()
        for number in range(_NUM_ROUNDS):
            for contestant in turns(f"round {number + 1} of {_NUM_ROUNDS}"):
                contestant.run_round(seconds / _NUM_ROUNDS)
        for contestant in turns("heartbeat"):
            contestant.run_beside_heartbeat(seconds / _NUM_ROUNDS)


def _bench_table(env_id: str, num_envs: int, env: EnvTimes, results: Sequence[Result]) -> Table:
    by_itself = (
        f"one by itself: step {as_text(env.step)}, reset {as_text(env.reset)}, construction {as_text(env.build)}"
    )
    table = Table(title=f"{num_envs} x {env_id}", caption=by_itself, title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("step", "env-steps/s", "overhead", "loop gap", "start"):
        table.add_column(name, justify="right", no_wrap=True)
    fastest = min((result.median_step_seconds for result in results), default=0.0)
    for result in results:
        is_measured = bool(result.step_seconds)
        table.add_row(
            result.name,
            as_text(result.median_step_seconds) if is_measured else "",
            f"{result.steps_per_second:,.0f}" if is_measured else "",
            "" if result.overhead is None else f"{result.overhead:.0%}",
            "" if result.longest_gap_seconds is None else as_text(result.longest_gap_seconds),
            as_text(result.start_seconds) if result.start_seconds else "",
            style="bold green" if is_measured and result.median_step_seconds == fastest else None,
        )
    return table


def _bench_record(
    env_id: str,
    num_envs: int,
    env_kwargs: dict[str, Any],
    mode: AutoresetMode,
    load: float,
    env: EnvTimes,
    results: Sequence[Result],
) -> dict[str, Any]:
    return {
        "date": dt.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": {
            "system": platform.platform(),
            "usable_cpus": usable_cpus(),
            "cpus": os.cpu_count(),
            "load_of_the_minute_before": load,
        },
        "versions": package_versions(),
        "env_id": env_id,
        "env_kwargs": {name: repr(value) for name, value in env_kwargs.items()},
        "num_envs": num_envs,
        "autoreset_mode": mode.value,
        "env_alone": {
            "build_seconds": env.build,
            "reset_seconds": env.reset,
            "step_seconds": env.step,
            "cpu_share_of_step": env.cpu,
            "is_async": env.is_async,
        },
        "results": [result.as_dict() for result in results],
        "advice": advice(env, results),
    }


def _draw(path: Path, env_id: str, num_envs: int, results: Sequence[Result]) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415  for a picture alone

    figure = Figure(figsize=(8, 0.5 * len(results) + 1.2), layout="constrained")
    axes = figure.subplots()
    colours = ["#2a6fb0" if result.num_workers is not None else "#c2553f" for result in results]
    speeds = [result.steps_per_second for result in results]
    bars = axes.barh([result.name for result in results], speeds, color=colours)
    axes.bar_label(bars, [f" {speed:,.0f}" for speed in speeds], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="env-steps a second", title=f"{num_envs} x {env_id}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        _fail(f"{path}: {error.strerror}")


def _numbers(option: str, texts: list[str]) -> list[int]:
    parts = [part.strip() for text in texts for part in text.split(",")]
    for part in parts:
        if not part.isdecimal():
            _fail(f"{option} {','.join(texts)}: {part!r} is no number from 0; expected such as 0,1,4")
    return [int(part) for part in parts]


def _env_kwargs(given: Iterable[str]) -> dict[str, Any]:
    """``render_mode=rgb_array``, ``gravity=9.8``: Python's literals, else text."""
    env_kwargs: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            _fail(f"--env-kwarg {text!r}: expected NAME=VALUE")
        try:
            env_kwargs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            env_kwargs[name] = value
    return env_kwargs


def _import(modules: Iterable[str]) -> None:
    sys.path.append(str(Path.cwd()))  # a module that lies here; last, so that a signal.py here is not in Python's place
    for module in modules:
        try:
            imported = importlib.import_module(module)
        except Exception as error:  # noqa: BLE001  a module may raise anything
            _fail(f"--import {module}: {_told(error)}")
        if module == "ale_py":  # it registers its games by a call of its own where the plugin was not found
            gym.register_envs(imported)


def _env_fn(env_id: str, env_kwargs: dict[str, Any]) -> Any:
    try:
        spec = find_spec(env_id)
    except ImportError as error:
        _fail(f"{env_id}: {_first_line(error)}")
    except gym.error.Error as error:
        _fail(f"{env_id}: {_first_line(error)} Third-party environments are registered by `--import MODULE`.")
    env_fn = env_maker(spec, (), env_kwargs)
    if not str(spec.entry_point).startswith("ale_py"):
        return env_fn

    def without_greeting() -> Any:  # each game prints two lines otherwise; an inner function travels whole
        ale_py = importlib.import_module("ale_py")
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        return env_fn()

    return without_greeting


# ---- aiovec doctor


@app.command()
def doctor(json_file: _JsonFile = None) -> None:
    """Looks at what this machine gives a vector, and says what to do where something is missing."""
    console = _console(json_file)
    table = Table(box=None, show_header=False, padding=(0, 1))
    for style in ("", "bold", "", "italic"):
        table.add_column(style=style or None, overflow="fold")
    findings: list[Finding] = []
    # No thread refreshes it: it would be there at the fork.
    with Live(table, console=console, auto_refresh=False, transient=True) as live:
        for finding in examine():
            findings.append(finding)
            table.add_row(_MARKS[finding.verdict], finding.check, escape(finding.found), finding.advice)
            live.refresh()
    console.print(table)
    if json_file is not None:
        _write(json_file, [finding.as_dict() for finding in findings])
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)


# ---- what both share


def _console(json_file: Path | None) -> Console:
    """What is shown; beside a record on stdout it goes to stderr."""
    return Console(stderr=json_file == _STDOUT, highlight=False)


def _write(path: Path, record: Any) -> None:
    text = json.dumps(record, indent=2) + "\n"
    try:
        if path == _STDOUT:
            sys.stdout.write(text)
        else:
            path.write_text(text)
    except OSError as error:
        _fail(f"{path}: {error.strerror}")


def _fail(message: str) -> NoReturn:
    _errors.print(f"aiovec: {message}", markup=False)
    raise typer.Exit(1)


def _told(error: BaseException) -> str:
    """On one line, and by its type: a `KeyError` says no more than a key."""
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    text = f"{error}".strip().partition("\n")[0]
    return text or type(error).__name__
