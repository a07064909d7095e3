"""A chart of the worker's memory, open files and threads."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

from benchmarks.soak.process_samples import Sample

_WIDTH, _HEIGHT, _MARGIN, _LABELS = 900, 220, 16, 70
_BLACK, _GRAY, _WHITE = (20, 20, 20), (205, 205, 205), (255, 255, 255)
_Measure = Callable[[Sample], float]
_PANELS: Sequence[tuple[str, Sequence[tuple[str, tuple[int, int, int], _Measure]]]] = (
    ("MB", (("memory (RSS)", (31, 119, 180), lambda sample: sample.rss_mb),)),
    (
        "count",
        (
            ("open files", (214, 39, 40), lambda sample: sample.fds),
            ("of these sockets", (255, 127, 14), lambda sample: sample.sockets),
            ("threads", (44, 160, 44), lambda sample: sample.threads),
        ),
    ),
)


def plot(samples: Sequence[Sample]) -> bytes:
    """Return a PNG of memory, open files and threads over the number of jobs."""
    image = Image.new("RGB", (_WIDTH, _HEIGHT * len(_PANELS)), _WHITE)
    draw = ImageDraw.Draw(image)
    for index, (unit, lines) in enumerate(_PANELS):
        top = max(measure(sample) for _, _, measure in lines for sample in samples) * 1.2 or 1.0
        panel = _Panel(draw, index * _HEIGHT, samples[-1].jobs, top)
        panel.frame(unit)
        for number, (name, color, measure) in enumerate(lines):
            panel.line(color, [(sample.jobs, measure(sample)) for sample in samples])
            panel.legend(number, name, color)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


class _Panel:
    """One pair of axes."""

    def __init__(self, draw: ImageDraw.ImageDraw, y: int, right: float, top: float) -> None:
        self._draw = draw
        self._y = y
        self._right = right
        self._top = top

    def _at(self, jobs: float, value: float) -> tuple[float, float]:
        width, height = _WIDTH - _LABELS - _MARGIN, _HEIGHT - 3 * _MARGIN
        return _LABELS + width * jobs / self._right, self._y + _MARGIN + height * (1 - value / self._top)

    def frame(self, unit: str) -> None:
        """Draw the axes, with a line at each half."""
        for value in (0.0, self._top / 2, self._top):
            self._draw.line([self._at(0, value), self._at(self._right, value)], _GRAY)
            x, y = self._at(0, value)
            self._draw.text((x - 8, y), f"{value:.0f} {unit}", _BLACK, anchor="rm")
        for jobs in (0, round(self._right / 2), round(self._right)):
            x, y = self._at(jobs, 0)
            self._draw.text((x, y + 6), f"{jobs} jobs", _BLACK, anchor="mt" if jobs < self._right else "rt")

    def line(self, color: tuple[int, int, int], points: Sequence[tuple[float, float]]) -> None:
        """Draw one line."""
        self._draw.line([self._at(*point) for point in points], color, width=2)

    def legend(self, number: int, name: str, color: tuple[int, int, int]) -> None:
        """Add a line to the legend."""
        self._draw.text((_LABELS + 10 + 150 * number, self._y + _MARGIN + 4), name, color)
