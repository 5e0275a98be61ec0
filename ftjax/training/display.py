"""What a person sees of a run: tables and a progress bar, or plain lines if the output is not a terminal."""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class Display:
    """The console of a run.

    every: how many steps apart lines are printed if the output is not a terminal.
    quiet: show nothing, as all but one of several processes do.
    """

    def __init__(self, every: int, quiet: bool = False):
        self.console = Console(highlight=False, quiet=quiet)
        if not self.console.is_terminal:
            self.console.width = 120
        self._every = every
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = None
        self._total = 0
        self._started = time.perf_counter()
        self._first = 0

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def draw(self, text: str) -> None:
        """Shows what is drawn in characters that not every output has."""
        if text and not self.console.options.ascii_only:
            self.console.print(text, soft_wrap=True, markup=False, emoji=False)

    def table(self, title: str, rows: dict[str, str]) -> None:
        """A two-column table, one line for each key."""
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, Text(value))
        self.console.print(table)

    def start_training(self, done: int, total: int) -> None:
        self._task = self._bar.add_task("training", total=total, completed=done, note="compiling")
        self._total, self._first = total, done + 1

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the loss, or of what the model wrote the reward, tokens per second and time left after a step."""
        rate, told = metrics.get("tokens_per_second"), "reward" if "reward" in metrics else "loss"
        note = f"{told} {metrics[told]:.4f}" + (f"  {rate:,.0f} tokens/s" if rate else "")
        if self._task is not None:
            self._bar.update(self._task, completed=step, note=note)
        if step == self._first:  # it compiled, so only later steps say how long the rest takes
            self._started = time.perf_counter()
        elif not self.console.is_terminal and (step % self._every == 0 or step == self._total):
            each = (time.perf_counter() - self._started) / (step - self._first)
            note += f"  {datetime.timedelta(seconds=round(each * (self._total - step)))} left"
        if not self.console.is_terminal and (step % self._every == 0 or step in (self._first, self._total)):
            self.say(f"step {step}/{self._total}  {note}")

    @contextlib.contextmanager
    def counter(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A separate bar for a side job such as an evaluation; call what it yields with how much is done."""
        task = self._bar.add_task(description, total=total, note="")
        try:
            yield lambda done: self._bar.update(task, completed=done)
        finally:
            self._bar.remove_task(task)
