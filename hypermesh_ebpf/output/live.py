"""The live table: drawn over itself at every sample, on the screen the user already has.

rich's Console decides about colours (NO_COLOR, COLORTERM, TERM).  rich's own Live is not used: it
hides the cursor, which a kill -9 leaves hidden, and it does not survive a terminal that becomes
narrower, because the lines that wrap are more than it goes back over.  Here a frame is one write,
nothing about the terminal is changed, and after a resize the screen is drawn anew from its top.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TextIO

from rich.console import COLOR_SYSTEMS, Console
from rich.style import Style

from hypermesh_ebpf.errors import OutputError
from hypermesh_ebpf.metrics.sample import End, Event, Sample, Start
from hypermesh_ebpf.output.events import EventLines
from hypermesh_ebpf.output.frame import Frame
from hypermesh_ebpf.output.grid import Line
from hypermesh_ebpf.output.writer import OutputClosed, Writer

STYLES = {
    "title": "bold",
    "head": "bold",
    "dim": "dim",
    "rate": "cyan",
    "bar": "cyan",
    "good": "green",
    "warn": "yellow",
    "bad": "bold red",
}

_PAUSE_S = 0.015
"""Events that come faster than this are drawn together."""
_BURST = 20
"""So many events of one draw are shown even where there is less room."""
_MIN_WIDTH, _MIN_HEIGHT = 20, 4

_END_LINE = "\x1b[K\n"
_CLEAR_BELOW = "\x1b[J"
_HOME = "\x1b[H"


class LiveTable:
    """Draws ``frame`` in place; ``events`` scroll away above it, into the terminal's history.

    A burst of events shows its end, and says how many were left out: no eye could follow it, and
    drawing them would cost more than what is watched.  ``-o json`` has all.

    Redraws at once when the terminal is resized, and draws nothing while the process is in the
    background.  The signal handlers for that (SIGWINCH, SIGCONT) are set from :meth:`start` to
    :meth:`close`, and only in the main thread.
    """

    def __init__(
        self, writer: Writer, stream: TextIO, frame: Frame, events: EventLines | None
    ) -> None:
        self.lost = 0
        self._writer = writer
        self._stream = stream
        self._frame = frame
        self._events = events
        self._paint = _painter(stream)
        self._size = (0, 0)
        self._height = 0  # of the frame on the screen, from the cursor upwards
        self._painted: tuple[int, int, list[str]] | None = None
        self._pending: deque[Event] = deque()
        self._skipped = 0  # events that came while we were in the background
        self._recent: deque[Event] = deque(maxlen=100)
        self._drawn = 0.0
        self._drawing = False
        self._handlers: dict[int, object] = {}

    def start(self, start: Start) -> None:
        self._frame.start(start)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGWINCH, signal.SIGCONT):
                self._handlers[number] = signal.signal(number, self._redraw)
        self._draw()

    def events(self, events: Sequence[Event]) -> None:
        if self._events is None:
            return
        self._pending.extend(events)
        if self._pending and time.monotonic() - self._drawn >= _PAUSE_S:
            self._draw_or_lose()

    def sample(self, sample: Sample) -> None:
        self._frame.sample(sample)
        self._painted = None
        self._draw_or_lose()

    def end(self, end: End) -> None:
        if self._writer.gone:
            return
        self._draw_or_lose()
        self._writer.write((self._frame.summary(end) + "\n").encode())
        self._height = 0

    def close(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _draw_or_lose(self) -> None:
        try:
            self._draw()
        except (OutputClosed, OutputError):
            self.lost += len(self._pending)
            self._pending.clear()
            raise

    def _redraw(self, number: int, _: FrameType | None) -> None:
        """The terminal was resized, or the process comes back from being stopped."""
        if number == signal.SIGCONT:
            self._height = 0  # what is above the cursor is the shell's now
        if not self._drawing and not self._writer.gone:
            # A handler interrupts anything: a failure is left to the next draw, which meets it too.
            with contextlib.suppress(OutputClosed, OutputError):
                self._draw()

    def _draw(self) -> None:
        """Draw events and frame, and once more if the terminal was resized meanwhile."""
        if not self._in_foreground():
            self._height = 0
            self._skipped += len(self._pending)
            self._recent.extend(self._pending)
            self._pending.clear()
            return
        self._drawing = True
        try:
            size = None
            while size != self._terminal_size():
                size = self._terminal_size()
                self._draw_at(*size)
        finally:
            self._drawing = False
            self._drawn = time.monotonic()

    def _draw_at(self, columns: int, rows: int) -> None:
        """One write: new events over where the frame was, then the frame below them."""
        # A line that fills the last column leaves the cursor in it, where erasing hits the text;
        # the last row is the cursor's own.
        width, height = max(columns - 1, _MIN_WIDTH), max(rows - 1, _MIN_HEIGHT)
        resized = self._size not in ((columns, rows), (0, 0))
        self._size = (columns, rows)
        if self._painted is None or self._painted[:2] != (columns, rows):
            self._painted = (columns, rows, self._paint_frame(width, height))
        frame = self._painted[2]
        above: list[Line] = []
        if self._events is not None:
            above = self._event_lines(self._events, width, max(height - len(frame), 5), resized)
        if resized:
            back = _HOME
        elif self._height:
            back = f"\r\x1b[{self._height}A"
        else:
            back = "\r"
        lines = [*map(self._paint, above), *frame]
        text = back + "".join([line + _END_LINE for line in lines]) + _CLEAR_BELOW
        self._writer.write(text.encode())
        self._height = len(frame)
        self._recent.extend(self._pending)
        self._pending.clear()

    def _paint_frame(self, width: int, height: int) -> list[str]:
        """The frame as text; beside events it leaves them two fifths of the screen."""
        if self._events is None:
            lines = self._frame.lines(width, height)
        else:
            lines = [[], *self._frame.lines(width, max(height * 3 // 5, min(height, 10)) - 1)]
        return [self._paint(line) for line in lines]

    def _event_lines(self, events: EventLines, width: int, room: int, resized: bool) -> list[Line]:
        """The new events; after a resize as many of the last ones as there is room for."""
        if resized:
            events.repeat_heading()
            shown = [*self._recent, *self._pending][1 - room :]
        else:
            shown = list(self._pending)[-max(room, _BURST) :]
        every = max(room - 3, 5)  # one heading is always in sight, if the frame grows a little too
        lines = events.lines(shown, width, every)
        skipped = self._skipped + max(len(self._pending) - len(shown), 0)
        self._skipped = 0
        if skipped:
            note = f"... {skipped:,} more events, -o json has them all"
            lines.insert(0, [(note[:width], "dim")])
        return lines

    def _in_foreground(self) -> bool:
        """Whether the terminal is ours to draw on; True where that cannot be told."""
        try:
            return os.tcgetpgrp(self._stream.fileno()) == os.getpgrp()
        except (OSError, ValueError):
            return True

    def _terminal_size(self) -> tuple[int, int]:
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            return 80, 24
        return columns or 80, rows or 24


def _painter(stream: TextIO) -> Callable[[Line], str]:
    """What turns a line into text with the escape codes of the terminal's colours."""
    console = Console(file=stream, force_terminal=True)
    system = COLOR_SYSTEMS.get(console.color_system or "")
    around: dict[str, tuple[str, str]] = {"": ("", "")}
    for name, definition in STYLES.items():
        style = Style.parse(definition)
        if console.no_color:
            style = style.without_color
        before, _, after = style.render("\0", color_system=system).partition("\0")
        around[name] = (before, after)

    def paint(line: Line) -> str:
        parts = []
        for text, name in line:
            before, after = around[name]
            parts.append(before + text + after if before else text)
        return "".join(parts)

    return paint
