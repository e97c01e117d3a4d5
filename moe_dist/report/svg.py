"""SVG by hand: elements, logarithmic axes and marks. What colours are is the style sheet's (classes s0 to s7)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor, log10
from typing import TypeVar

from markupsafe import Markup, escape

T = TypeVar("T")
WIDTH = 390.0  # units of every chart; text is 12 of them high
LETTER = 7.2  # width of a letter, rather too much
LEFT, RIGHT, BOTTOM = 56.0, 12.0, 42.0  # of a chart around its plot
PLOT = 190.0  # height of a plot
SERIES = 8  # colours and shapes, then they come again
# Points of a mark around (0, 0). Shapes tell series apart where colours don't.
SHAPES = (
    "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0z",
    "M-4,-4h8v8h-8z",
    "M0,-5.4L5,4H-5z",
    "M0,-5.6L5.6,0L0,5.6L-5.6,0z",
)


@dataclass(frozen=True)
class Figure:
    """`svg` has its title and its marks' texts in it; `note` is what else must be said."""

    title: str
    svg: Markup
    note: str = ""


def element(name: str, *content: object, **attributes: object) -> Markup:
    """Content and values are escaped; `class_` is the attribute class, and underscores are hyphens."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(plain(value))}"' for key, value in attributes.items()
    )
    return Markup(f"<{name}{given}>{''.join(map(escape, content))}</{name}>")


def plain(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def text(x: float, y: float, *content: object, **attributes: object) -> Markup:
    return element("text", *content, x=x, y=y, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def mark(x: float, y: float, series: int, tip: str, flawed: bool = False) -> Markup:
    """A point with its text. `flawed`: hollow."""
    return element("g", element("title", tip), _sign(x, y, series), class_=f"pt s{series % SERIES}{' flawed' * flawed}")


def path(points: Iterable[tuple[float, float]], class_: str) -> Markup:
    return element("path", d="M" + "L".join(f"{plain(x)},{plain(y)}" for x, y in points), class_=class_)


def cut(words: str, width: float) -> str:
    """As much of it as has room in `width` units."""
    most = max(int(width / LETTER), 2)
    return words if len(words) <= most else words[: most - 1] + "…"


def chart(title: str, height: float, *parts: object) -> Markup:
    return element(
        "svg", *parts, viewBox=f"0 0 {plain(WIDTH)} {plain(height)}", role="img", aria_label=title, tabindex=0
    )


def legend(names: Sequence[tuple[int, str]], dashed: str = "", bars: bool = False) -> tuple[Markup, float]:
    """Series with their marks, which are squares for `bars`, in as many lines as they take, and the y below them."""
    x, y, found = 6.0, 12.0, []
    for series, name in [*names, *([(-1, dashed)] if dashed else [])]:
        shown = cut(name, WIDTH - 40)
        room = 34 + len(shown) * LETTER
        if x > 6 and x + room > WIDTH:
            x, y = 6.0, y + 16
        if series < 0:
            found.append(line(x - 4, y - 4, x + 10, y - 4, "floor"))
        else:
            found.append(_sign(x + 3, y - 4, 1 if bars else series, f"s{series % SERIES}"))
        found.append(text(x + 14, y, shown))
        x += room
    return Markup("").join(found), y + 8


def _sign(x: float, y: float, shape: int, class_: str = "") -> Markup:
    at = f"translate({plain(x)},{plain(y)})"
    classed = {"class_": class_} if class_ else {}
    return element("path", d=SHAPES[shape % len(SHAPES)], transform=at, **classed)


@dataclass(frozen=True)
class Scale:
    """Logarithmic, from values `low` to `high` on units `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (self.stop - self.start) * log10(value / self.low) / log10(self.high / self.low)

    def ticks(self) -> list[float]:
        """Round numbers, one at least where the scale spans a quarter, and six at most."""
        least, most = floor(log10(self.low)), floor(log10(self.high)) + 1
        fine = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
        for steps in (fine, (1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**power for power in range(least, most + 1) for step in steps]
            found = [tick for tick in found if self.low <= tick <= self.high]
            if len(found) <= 6:
                break
        return found if len(found) <= 6 else found[:: -(-len(found) // 6)]


def spanning(values: Iterable[float], start: float, stop: float, room: float = 1.15) -> Scale:
    """A scale for these, with a little room on both sides."""
    given = list(values)
    return Scale(min(given) / room, max(given) * room, start, stop)


def tick_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def axes(x: Scale, y: Scale, x_ticks: Sequence[float], x_name: str, y_name: str) -> Markup:
    """Lines of the grid with their numbers. A number that would run into the one before it is left out."""
    found: list[Markup] = []
    left, right, bottom = x.start, x.stop, y.start
    for tick in y.ticks():
        found += [line(left, y(tick), right, y(tick), "grid"),
                  text(left - 5, y(tick) + 4, tick_text(tick), text_anchor="end")]  # fmt: skip
    free = 0.0
    for tick in x_ticks:
        shown, at = tick_text(tick), x(tick)
        half = len(shown) * LETTER / 2
        found.append(line(at, bottom, at, bottom + 4, "axis"))
        if at - half >= free:
            found.append(text(min(at, WIDTH - half), bottom + 17, shown, text_anchor="middle"))
            free = at + half + 6
    found += [line(left, bottom, right, bottom, "axis"),
              text((left + right) / 2, bottom + 33, x_name, text_anchor="middle", class_="name"),
              text(4, y.stop - 14, y_name, class_="name")]  # fmt: skip
    return Markup("").join(found)


def thinned(items: Sequence[T], most: int) -> list[T]:
    """Evenly spread ones, both ends among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]
