"""Record a command as a moving picture of a terminal: an SVG whose lines appear when they appeared, in at most a minute.

python docs/record_terminal.py docs/images/demo.svg 'longslide demo'
"""

import re
import subprocess
import sys
import textwrap
import time
from html import escape
from pathlib import Path

SECONDS = 60.0
"""The picture's length: a longer run is shown faster, which the title says."""

COLUMNS, ROWS, LINE_HEIGHT, CHARACTER = 112, 34, 17, 7.83


def record(command: str) -> list[tuple[float, str]]:
    """Run a command, and say after how many seconds each line of its output came."""
    begun = time.monotonic()
    lines = [(0.0, f"$ {command}")]
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines += [(time.monotonic() - begun, line.rstrip()) for line in process.stdout]
    if process.returncode:
        sys.exit(f"{command}: ended with status {process.returncode}\n" + "\n".join(line for _, line in lines[-10:]))
    return lines


def draw(lines: list[tuple[float, str]]) -> str:
    """The SVG: each line is put in at its time, and the page moves up when it is full."""
    took = lines[-1][0]
    speed = max(1.0, took / (SECONDS - 6))
    wrapped = [(at / speed, part, _kind(line)) for at, line in lines for part in _wrap(line)]
    length = wrapped[-1][0] + 6  # the end stays for a while
    width, height = COLUMNS * CHARACTER + 32, ROWS * LINE_HEIGHT + 58
    rules, texts, moves = [], [], ["0%{transform:translateY(0)}"]
    for number, (at, line, kind) in enumerate(wrapped):
        begin = 100 * at / length
        rules.append(f"@keyframes l{number}{{0%,{begin:.3f}%{{opacity:0}}{begin + 0.001:.3f}%,100%{{opacity:1}}}}")
        style = f"animation:l{number} {length:.1f}s linear infinite"
        y = (number + 1) * LINE_HEIGHT
        texts.append(f'<text x="0" y="{y}" class="{kind}" style="{style}">{escape(line)}</text>')
        if number >= ROWS:
            shift = (number + 1 - ROWS) * LINE_HEIGHT
            moves += [f"{begin:.3f}%{{transform:translateY({LINE_HEIGHT - shift}px)}}"]
            moves += [f"{begin + 0.001:.3f}%{{transform:translateY({-shift}px)}}"]
    moves.append(f"100%{{transform:translateY({-max(0, len(wrapped) - ROWS) * LINE_HEIGHT}px)}}")
    title = f"{lines[0][1][2:]}: {took:.0f} seconds" + (f", shown {speed:.1f} times as fast" if speed > 1 else "")
    style = (
        "text{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre;"
        "fill:#d6deeb}.rule{fill:#7fdbca;font-weight:bold}.command{fill:#ffcb6b}.result{fill:#addb67}.title{fill:#8899aa}"
        f".page{{animation:move {length:.1f}s linear infinite}}@keyframes move{{{''.join(moves)}}}{''.join(rules)}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" role="img">'
        f"<title>{escape(title)}</title><style>{style}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="#011627"/><text x="16" y="24" class="title">{escape(title)}</text>'
        f'<svg x="16" y="38" width="{width - 32:.0f}" height="{ROWS * LINE_HEIGHT}" '
        f'viewBox="0 6 {width - 32:.0f} {ROWS * LINE_HEIGHT}"><g class="page">{"".join(texts)}</g>'
        "</svg></svg>\n"
    )


def _wrap(line: str) -> list[str]:
    return textwrap.wrap(line, COLUMNS, subsequent_indent="    ", break_on_hyphens=False) or [""]


def _kind(line: str) -> str:
    if re.match(r"─+ ", line):
        return "rule"
    if line.startswith(("$ ", "  longslide ", "    --")):
        return "command"
    return "result" if re.match(r"\[\d+/\d+\] done|.*AUROC", line) else "line"


def main() -> None:
    """Record, and write the picture."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    Path(sys.argv[1]).write_text(draw(record(sys.argv[2])), encoding="utf-8")


if __name__ == "__main__":
    main()
