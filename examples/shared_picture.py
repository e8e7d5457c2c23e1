"""A picture of the shared demo as SVG: TTFT per request by where its prefix came from, and read rates."""

from __future__ import annotations

from typing import Any

BAR, GAP, LEFT, WIDTH = 15, 14, 190, 560
STYLE = """\
<style>
 text { font: 13px system-ui, sans-serif; fill: #24292f }
 .small { font-size: 12px } .title { font-size: 16px; font-weight: 600 }
 .cold { fill: #8c959f } .shared { fill: #0969da } .disk { fill: #1a7f37 }
 @media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .cold { fill: #6e7681 } .shared { fill: #4493f8 } .disk { fill: #3fb950 }
 }
</style>"""


class Drawing:
    """Bars below each other."""

    def __init__(self) -> None:
        self.y = 0
        self._parts: list[str] = []

    def title(self, text: str) -> None:
        self.y += 34
        self._parts.append(f'<text class="title" x="16" y="{self.y}">{text}</text>')
        self.y += 16

    def legend(self, entries: list[tuple[str, str]]) -> None:
        for number, (kind, text) in enumerate(entries):
            x = 16 + number * 210
            self._parts.append(
                f'<rect class="{kind}" x="{x}" y="{self.y}" width="12" height="12"/>'
                f'<text class="small" x="{x + 18}" y="{self.y + 11}">{text}</text>'
            )
        self.y += 28

    def bars(self, label: str, bars: list[tuple[str, float, str]], most: float) -> None:
        """label: beside them. bars: kind, value, text."""
        middle = self.y + len(bars) * BAR / 2 + 4
        self._parts.append(f'<text x="16" y="{middle:.0f}">{label}</text>')
        for kind, value, text in bars:
            length = max(2.0, value / most * (WIDTH - 80))
            self._parts.append(
                f'<rect class="{kind}" x="{LEFT}" y="{self.y}" width="{length:.1f}" height="{BAR - 2}"/>'
                f'<text class="small" x="{LEFT + length + 6:.1f}" y="{self.y + BAR - 4}">{text}</text>'
            )
            self.y += BAR
        self.y += GAP

    def svg(self, title: str) -> str:
        width, height = LEFT + WIDTH + 20, self.y + 8
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img">'
        )
        return "\n".join([head, f"<title>{title}</title>", STYLE, *self._parts, "</svg>\n"])


def shared_picture(report: dict[str, Any], *, limit: int) -> str:
    """report: rows of first_read and second_read, and rates in bytes per second. limit: 0 for none."""
    drawing = Drawing()
    drawing.title("Time to first token on node B, of prompts that node A computed")
    drawing.legend(
        [
            ("cold", "computed"),
            ("shared", "first read, B's disk is empty"),
            ("disk", "second read, B's disk"),
        ]
    )
    pairs = list(zip(report["first_read"], report["second_read"], strict=True))
    most = max(max(first["ttft_cold_ms"], first["ttft_ms"], second["ttft_ms"]) for first, second in pairs)
    for first, second in pairs:
        values = [
            ("cold", first["ttft_cold_ms"]),
            ("shared", first["ttft_ms"]),
            ("disk", second["ttft_ms"]),
        ]
        bars = [(kind, value, f"{value:.0f} ms") for kind, value in values]
        drawing.bars(f"{first['prompt_tokens']} tokens", bars, most)
    rates = {name: value / 1e6 for name, value in report["rates"].items()}
    behind = f", behind a link of {limit / 1e6:.0f} MB/s" if limit else ""
    drawing.title(f"Reading blocks of 1 MiB{behind}")
    for label, kind, name in (
        ("first read, shared folder", "shared", "first"),
        ("second read, own disk", "disk", "second"),
        ("a tier only ever local", "cold", "local"),
    ):
        bar = (kind, rates[name], f"{rates[name]:.0f} MB/s")
        drawing.bars(label, [bar], max(rates.values()))
    return drawing.svg("A prefix computed on one node, read on another")
