"""A bar picture of TTFT, cold against served by kvstrata, as SVG. Reads in light and dark surroundings."""

from __future__ import annotations

from typing import Any

BAR, GAP, LEFT, WIDTH = 16, 14, 130, 560
STYLE = """\
<style>
 text { font: 13px system-ui, sans-serif; fill: #24292f }
 .small { font-size: 12px } .title { font-size: 16px; font-weight: 600 }
 .cold { fill: #8c959f } .warm { fill: #1a7f37 }
 @media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .cold { fill: #6e7681 } .warm { fill: #3fb950 }
 }
</style>"""


def ttft_picture(rows: list[dict[str, Any]]) -> str:
    """rows: prompt_tokens, ttft_cold_ms and ttft_ms of each request."""
    scale = (WIDTH - 70) / max(max(row["ttft_cold_ms"], row["ttft_ms"]) for row in rows)
    height = 66 + len(rows) * (2 * BAR + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {height}" '
        f'width="{LEFT + WIDTH + 20}" height="{height}" role="img">',
        "<title>Time to first token, computed against served by kvstrata</title>",
        STYLE,
        '<text class="title" x="16" y="28">Time to first token after a restart</text>',
        '<rect class="cold" x="16" y="42" width="12" height="12"/>'
        '<text class="small" x="34" y="53">computed (plain vLLM)</text>',
        '<rect class="warm" x="200" y="42" width="12" height="12"/>'
        '<text class="small" x="218" y="53">prefix served by kvstrata from disk</text>',
    ]
    for number, row in enumerate(rows):
        top = 72 + number * (2 * BAR + GAP)
        parts.append(f'<text x="16" y="{top + BAR + 4}">{row["prompt_tokens"]} tokens</text>')
        for line, (kind, value) in enumerate((("cold", row["ttft_cold_ms"]), ("warm", row["ttft_ms"]))):
            y = top + line * BAR
            length = max(2.0, value * scale)
            parts.append(
                f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}"/>'
                f'<text class="small" x="{LEFT + length + 6:.1f}" y="{y + BAR - 4}">{value:.0f} ms</text>'
            )
    return "\n".join([*parts, "</svg>\n"])
