"""The pictures of the pages, as SVG files that follow the reader's light or dark scheme.

`python -m docs.tools.pictures` writes docs/pictures/*.svg anew; a test compares them with this file.
"""

import csv
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
FOLDER = DOCS / "pictures"
DIFFERENCES = DOCS / "results" / "study" / "differences.csv"
LOGS = {"movielens": "MovieLens", "food_kitchen": "Food-Kitchen", "simulated": "simulated"}

STYLE = """
  text { font: 15px system-ui, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; fill: #1f2328 }
  .head { font-weight: 600 }
  .note { font-size: 13px; fill: #59636e }
  .box { fill: #f6f8fa; stroke: #8c959f; stroke-width: 1.2 }
  .text { fill: #fff8e6; stroke: #b08800; stroke-width: 1.2 }
  .train { fill: #e9f2ff; stroke: #2f6fd0; stroke-width: 1.2 }
  .frozen { fill: #eaf7ee; stroke: #2e8b57; stroke-width: 1.2 }
  .room { fill: none; stroke: #8c959f; stroke-dasharray: 5 4 }
  .line { fill: none; stroke: #59636e; stroke-width: 1.5 }
  .cut { fill: none; stroke: #cf222e; stroke-width: 1.5; stroke-dasharray: 4 3 }
  .tip { fill: #59636e }
  .sure { fill: #2f6fd0; fill-opacity: .75 }
  .unsure { fill: none; stroke: #2f6fd0 }
  .mean { stroke: #1f2328; stroke-width: 2.2 }
  .grid { stroke: #d0d7de; stroke-width: 1 }
  .zero { stroke: #59636e; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .note { fill: #9da7b1 }
    .box { fill: #20262e; stroke: #6e7681 }
    .text { fill: #332b11; stroke: #c69a1f }
    .train { fill: #14284a; stroke: #5b96e8 }
    .frozen { fill: #12301f; stroke: #4fb077 }
    .room { stroke: #6e7681 }
    .line { stroke: #9da7b1 }
    .cut { stroke: #ff7b72 }
    .tip { fill: #9da7b1 }
    .sure { fill: #5b96e8 }
    .unsure { stroke: #5b96e8 }
    .mean { stroke: #e6edf3 }
    .grid { stroke: #30363d }
    .zero { stroke: #9da7b1 }
  }
"""


@dataclass
class Picture:
    """An SVG picture that is drawn by boxes, arrows and words at given places, in pixels.

    Attributes:
        width: Of the whole picture.
        height: Of the whole picture.
        title: What the picture says, for those who cannot see it.
    """

    width: int
    height: int
    title: str
    _elements: list[str] = field(default_factory=list)

    def box(self, x: int, y: int, w: int, h: int, *lines: str, kind: str = "box") -> None:
        """Draws a rounded box; its first line is bold, lines that begin with `~` are small."""
        self._elements.append(
            f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="7"/>'
        )
        top = y + h / 2 - 9.5 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            style = "note" if line.startswith("~") else "head" if number == 0 else ""
            self.words(x + w // 2, top + 19 * number, line.removeprefix("~"), style)

    def words(self, x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> None:
        """Writes a line whose middle (or `start`, or `end`) is at x and whose base line is at y."""
        style = f' class="{kind}"' if kind else ""
        self._elements.append(
            f'<text{style} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[int, int], kind: str = "line", tip: bool = True) -> None:
        """Draws straight pieces from point to point, with a tip at the last one."""
        path = "M" + " L".join(f"{x} {y}" for x, y in points)
        end = ' marker-end="url(#tip)"' if tip else ""
        self._elements.append(f'<path class="{kind}" d="{path}"{end}/>')

    def dot(self, x: float, y: float, filled: bool) -> None:
        """Draws a dot, filled or hollow."""
        kind = "sure" if filled else "unsure"
        self._elements.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.2"/>')

    def segment(self, x: float, top: float, bottom: float, kind: str) -> None:
        """Draws an upright line."""
        self._elements.append(
            f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:g}" y2="{bottom:g}"/>'
        )

    def svg(self) -> str:
        """The whole file."""
        marker = (
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" '
            'markerHeight="8" orient="auto"><path class="tip" d="M0 0 L10 5 L0 10 z"/></marker></defs>'
        )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">'
        )
        title = f"<title>{escape(self.title)}</title>"
        return "\n".join(
            [head, title, f"<style>{STYLE}</style>", marker, *self._elements, "</svg>\n"]
        )


def overview() -> Picture:
    """From the log to the model, the picture of the README."""
    p = Picture(
        900,
        640,
        "From the log to the model: what is read offline, what is trained, what is frozen.",
    )
    p.words(20, 28, "Offline, once", "note", "start")
    p.box(20, 40, 250, 58, "your log (Parquet)", "~user, item, scenario, time, label")
    p.box(610, 40, 270, 58, "your texts", "~titles, categories, scenario names")
    p.box(20, 136, 120, 44, "profile")
    p.box(150, 136, 250, 44, "train, valid, test", "~later events")
    p.arrow((80, 98), (80, 136))
    p.arrow((210, 98), (210, 136))
    p.words(88, 121, "split by time", "note", "start")
    p.box(440, 136, 150, 44, "prompts", kind="text")
    p.box(640, 128, 240, 60, "frozen language model", "~resumable, many processes", kind="text")
    p.arrow((80, 180), (80, 206), (515, 206), (515, 180))
    p.words(312, 223, "only these events reach a prompt", "note", "start")
    p.arrow((745, 98), (745, 112), (515, 112), (515, 136))
    p.arrow((590, 158), (640, 158))
    p.box(
        610,
        232,
        270,
        58,
        "knowledge stores (Parquet)",
        "~a vector per user, item, scenario",
        kind="frozen",
    )
    p.arrow((760, 188), (760, 232))

    p.words(20, 336, "While training", "note", "start")
    p.box(20, 348, 250, 58, "sharded id tables", "~user, item; trained", kind="train")
    p.box(610, 348, 270, 58, "sharded frozen tables", "~half precision, no gradient", kind="frozen")
    p.arrow((300, 180), (300, 318), (145, 318), (145, 348))
    p.arrow((300, 318), (690, 318), (690, 348), kind="cut")
    p.words(455, 310, "joined by key, only where the event is later", "note")
    p.arrow((800, 290), (800, 348))

    p.box(310, 348, 260, 58, "bottom input x", "~embeddings side by side", kind="train")
    p.arrow((270, 377), (310, 377))
    p.box(310, 436, 260, 44, "user-level meta layers", kind="train")
    p.box(310, 510, 260, 44, "backbone", "~SharedBottom, STAR, PEPNet, …", kind="train")
    p.arrow((440, 406), (440, 436))
    p.arrow((440, 480), (440, 510))
    p.box(20, 473, 250, 44, "scenario-level meta layers", kind="train")
    p.arrow((350, 406), (350, 421), (145, 421), (145, 473))
    p.box(610, 473, 270, 44, "match of user and item", kind="train")
    p.arrow((745, 406), (745, 473))
    p.arrow((640, 406), (640, 458), (570, 458))
    p.words(606, 450, "code z", "note")
    p.box(310, 586, 260, 40, "sum of logits, one loss")
    p.arrow((440, 554), (440, 586))
    p.arrow((145, 517), (145, 606), (310, 606))
    p.arrow((745, 517), (745, 606), (570, 606))
    return p


def model() -> Picture:
    """The additions to a backbone, and what generates them."""
    p = Picture(
        900, 430, "A backbone with user-level layers before it, a scenario branch and a match."
    )
    p.box(20, 20, 250, 58, "user's vector", "~centred, length 1", kind="frozen")
    p.box(20, 120, 250, 58, "scenario's vector", kind="frozen")
    p.box(20, 220, 250, 58, "item's vector", kind="frozen")
    p.box(
        330,
        330,
        250,
        72,
        "bottom input x",
        "~user, item, scenario, history,",
        "~two products",
        kind="train",
    )
    p.box(330, 220, 250, 58, "user-level meta layers", "~h + W(z) h + b(z)", kind="train")
    p.box(330, 120, 250, 58, "backbone", "~knows nothing of knowledge", kind="train")
    p.box(630, 220, 250, 58, "scenario-level layers", "~a generated stack over x", kind="train")
    p.box(630, 20, 250, 58, "match", "~of user and item vector", kind="train")
    p.box(630, 120, 250, 58, "logit", "~sum, or another fusion")
    p.arrow((455, 330), (455, 278))
    p.arrow((455, 220), (455, 178))
    p.arrow((580, 149), (630, 149))
    p.arrow((580, 366), (755, 366), (755, 278))
    p.arrow((755, 220), (755, 178))
    p.arrow((755, 78), (755, 120))
    p.arrow((270, 40), (630, 40))
    p.arrow((310, 40), (310, 240), (330, 240))
    p.words(318, 214, "z", "note", "start")
    p.arrow((270, 149), (298, 149), (298, 300), (605, 300), (605, 258), (630, 258))
    p.words(588, 292, "z", "note")
    p.arrow((270, 232), (285, 232), (285, 62), (630, 62))
    p.arrow((145, 278), (145, 366), (330, 366))
    p.words(155, 330, "projected, added", "note", "start")
    return p


def as_of() -> Picture:
    """Three vectors of one user on the axis of time, and which event meets which."""
    p = Picture(900, 230, "Events on the axis of time, and the vector that each may meet.")
    p.arrow((20, 120), (880, 120))
    p.words(876, 142, "time", "note", "end")
    for x, words in ((300, "cut-off of vector 1"), (590, "cut-off of vector 2")):
        p.segment(x, 48, 150, "cut")
        p.words(x, 40, words, "note")
    for x in (60, 130, 190, 250, 300, 370, 470, 530, 590, 680, 790):
        p.dot(x, 120, x not in (370, 470, 530, 680, 790))
    p.words(160, 100, "profile events: in the prompt", "note")
    p.words(450, 100, "meet vector 1", "note")
    p.words(735, 100, "meet vector 2", "note")
    p.box(40, 168, 250, 44, "no vector", "~the learned default")
    p.box(325, 168, 240, 44, "vector 1", "~of events up to its cut-off", kind="frozen")
    p.box(610, 168, 250, 44, "vector 2", "~newer, of a later store", kind="frozen")
    p.arrow((445, 168), (445, 130))
    p.arrow((735, 168), (735, 130))
    p.arrow((160, 168), (160, 130))
    return p


def streams() -> Picture:
    """Ten rows in four streams over two ranks, two steps of four samples and one of padding."""
    p = Picture(
        900,
        250,
        "Ten rows in four streams: the shorter streams are padded, and all ranks take three steps.",
    )
    for step in range(3):
        p.words(330 + 190 * step, 30, f"step {step + 1}", "head")
    bounds = [10 * k // 4 for k in range(5)]
    for k in range(4):
        y = 44 + 46 * k
        p.words(20, y + 24, f"stream {k}", "head", "start")
        p.words(120, y + 24, f"rank {k // 2}", "note", "start")
        rows = list(range(bounds[k], bounds[k + 1]))
        for step in range(3):
            row = f"row {rows[step]}" if step < len(rows) else "~padding: weight 0"
            kind = "train" if step < len(rows) else "room"
            p.box(250 + 190 * step, y, 160, 36, row, kind=kind)
    p.words(
        20,
        240,
        "Longest stream: 3 rows, 1 sample of it per step, so 3 steps everywhere.",
        "note",
        "start",
    )
    return p


def zero_collision() -> Picture:
    """The way of an id to its row."""
    p = Picture(900, 290, "From an id to its row: hash, owners, sketch, admission, eviction.")
    p.box(20, 40, 130, 50, "id", "~integer or text")
    p.box(190, 40, 150, 50, "64-bit key", "~bijection, or digest")
    p.box(380, 40, 180, 50, "owners", "~key to its row", kind="text")
    p.box(700, 40, 180, 50, "its row", "~vector, optimizer state", kind="train")
    p.arrow((150, 65), (190, 65))
    p.arrow((340, 65), (380, 65))
    p.arrow((560, 65), (700, 65))
    p.words(630, 57, "has a row", "note")
    p.box(380, 140, 180, 50, "count-min sketch", "~counts until admission", kind="text")
    p.arrow((470, 90), (470, 140))
    p.words(480, 120, "has none", "note", "start")
    p.box(700, 140, 180, 50, "row 0", "~shared by unknown ids", kind="train")
    p.arrow((560, 165), (700, 165))
    p.words(630, 157, "this time", "note")
    p.box(380, 226, 180, 50, "eviction", "~takes and gives rows", kind="text")
    p.arrow((470, 190), (470, 226))
    p.words(480, 213, "seen often enough", "note", "start")
    p.arrow((380, 251), (360, 251), (360, 80), (380, 80))
    p.words(350, 180, "a new owner", "note", "end")
    p.arrow((560, 251), (895, 251), (895, 65), (880, 65))
    p.words(730, 243, "the row starts clean", "note")
    return p


def strips(title: str, rows: list[tuple[str, str, str, str]]) -> Picture:
    """Differences of the study: a strip per row, a dot per backbone, a bar at the mean.

    Args:
        title: What the picture says.
        rows: (words, arm, base, metric) of differences over all test events; each for every log.
    """
    with DIFFERENCES.open(newline="") as handle:
        lines = [row for row in csv.DictReader(handle) if row["section"] == "overall"]
    drawn = [(log, *row) for log in LOGS for row in rows]
    left, right, step, top = 330, 860, 40, 34
    bottom = top + step * len(drawn)
    p = Picture(900, bottom + 44, title)
    low, high = -0.02, 0.08

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    for tick in range(-2, 9, 2):
        p.segment(x(tick / 100), top - 10, bottom, "grid" if tick else "zero")
        p.words(x(tick / 100), bottom + 18, f"{tick / 100:+.2f}" if tick else "0", "note")
    for number, (log, words, arm, base, metric) in enumerate(drawn):
        y = top + step * number + step / 2 - 6
        if number % len(rows) == 0:
            p.words(20, y + 5, LOGS[log], "head", "start")
        p.words(left - 16, y + 5, words, "note", "end")
        chosen = [
            row
            for row in lines
            if (row["dataset"], row["arm"], row["base"], row["metric"]) == (log, arm, base, metric)
        ]
        for place, row in enumerate(chosen):
            sure = float(row["low"]) > 0 or float(row["high"]) < 0
            p.dot(x(float(row["difference"])), y + 5 * (place % 3 - 1), sure)
        mean = sum(float(row["difference"]) for row in chosen) / len(chosen)
        p.segment(x(mean), y - 13, y + 13, "mean")
    return p


PICTURES = {
    "overview": overview,
    "model": model,
    "as_of": as_of,
    "streams": streams,
    "zero_collision": zero_collision,
    "results_knowledge": partial(
        strips,
        "LLM4MSR minus the backbone, and minus its control with wrong users: differences in test AUC",
        [
            ("LLM4MSR - backbone", "llm4msr", "alone", "auc"),
            ("LLM4MSR - control", "llm4msr", "shuffled", "auc"),
        ],
    ),
    "results_gauc": partial(
        strips,
        "LLM4MSR minus its control with wrong users: difference in AUC, and inside users (GAUC)",
        [
            ("over all events (AUC)", "llm4msr", "shuffled", "auc"),
            ("inside a user (GAUC)", "llm4msr", "shuffled", "gauc"),
        ],
    ),
    "results_features": partial(
        strips,
        "LLM4MSR minus the same vectors as plain input features: differences in test AUC",
        [("LLM4MSR - features", "llm4msr", "features", "auc")],
    ),
}


def main() -> None:
    """Writes all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
