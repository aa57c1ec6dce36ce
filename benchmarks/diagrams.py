"""The two drawings of the documentation: how LR-QAT works, and which method to choose.

    python benchmarks/diagrams.py            # writes them anew into docs/images
    python benchmarks/diagrams.py --check    # fails if that would change them

Figures come from benchmarks/results. Text stands in filled boxes only, so that a page may be dark or light.
"""

from __future__ import annotations

import argparse
import json
import sys
from html import escape
from pathlib import Path
from typing import Any

from accuracy_report import Row, best_of, read, recovered

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"

#: What a box is -> fill, edge.
KINDS = {
    "question": ("#eceff4", "#64748b"),
    "frozen": ("#dbeafe", "#2563a8"),
    "trained": ("#fdecc8", "#b7791f"),
    "step": ("#f4f4f5", "#71717a"),
    "kept": ("#d7f2e0", "#2f855a"),
}
INK, LINE = "#1b2430", "#8592a3"
LEADING = 20


class Drawing:
    """Boxes and arrows as SVG; coordinates are pixels, from the upper left."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title = (width, height), title
        self.parts: list[str] = []

    def box(self, x: int, y: int, width: int, height: int, kind: str, *lines: str) -> None:
        """Lines are centred; a first line that begins with '*' is bold, those with '`' are code."""
        fill, edge = KINDS[kind]
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="9" fill="{fill}" stroke="{edge}" '
            'stroke-width="1.5"/>'
        )
        first = y + height / 2 - LEADING * (len(lines) - 1) / 2 + 5
        for number, line in enumerate(lines):
            style = ' font-weight="bold"' if line.startswith("*") else ""
            style += ' font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13"' if "`" in line else ""
            text = escape(line.strip("*").replace("`", ""))
            self.parts.append(
                f'<text x="{x + width / 2:g}" y="{first + LEADING * number:g}" text-anchor="middle"{style}>'
                f"{text}</text>"
            )

    def arrow(self, *points: tuple[int, int]) -> None:
        path = "M" + " L".join(f"{x} {y}" for x, y in points)
        self.parts.append(f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="2" marker-end="url(#tip)"/>')

    def sign(self, x: int, y: int, text: str, width: int = 30) -> None:
        """A small label on an arrow."""
        self.parts.append(
            f'<rect x="{x - width / 2:g}" y="{y - 13}" width="{width}" height="26" rx="13" fill="#ffffff" '
            f'stroke="{LINE}" stroke-width="1.5"/>'
            f'<text x="{x}" y="{y + 5}" text-anchor="middle">{escape(text)}</text>'
        )

    def svg(self) -> str:
        width, height = self.size
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}" role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, '
                f'sans-serif" font-size="14" fill="{INK}">',
                f"<title>{escape(self.title)}</title>",
                '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
                f'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{LINE}"/></marker></defs>',
                *self.parts,
                "</svg>\n",
            ]
        )


def how_it_works() -> str:
    """One weight on its way: base and adapter, rounded, to the integer of the file."""
    draw = Drawing(830, 430, "LR-QAT: the adapter is added before the rounding, and the integers are what is saved")
    draw.box(10, 20, 180, 100, "frozen", "*base", "frozen, 1 byte a weight", "or packed, bits / 8", "2.41 steps")
    draw.box(10, 160, 180, 100, "trained", "*adapter  c · B A", "trained, rank 32", "in grid steps", "+ 0.22 steps")
    draw.sign(230, 140, "+")
    draw.arrow((190, 70), (230, 70), (230, 126))
    draw.arrow((190, 210), (230, 210), (230, 154))
    draw.box(270, 90, 130, 100, "step", "*round, clip", "in every forward", "2.63 → 3")
    draw.arrow((246, 140), (268, 140))
    draw.box(435, 90, 150, 100, "kept", "*integers", "-8 ... 7 at 4 bits", "3")
    draw.arrow((400, 140), (433, 140))
    draw.box(435, 230, 150, 100, "trained", "*scales", "trained; rounded to", "what the file stores", "0.021")
    draw.box(650, 90, 170, 100, "step", "*weight", "for one layer at a time", "3 × 0.021 = 0.063")
    draw.arrow((585, 140), (648, 140))
    draw.arrow((585, 280), (615, 280), (615, 154))
    draw.sign(615, 140, "×")
    draw.box(650, 20, 170, 40, "step", "y = x Wᵀ + bias")
    draw.arrow((735, 90), (735, 62))
    draw.box(240, 230, 160, 100, "kept", "*the file", "these integers, these", "scales: nothing is", "rounded again")
    draw.arrow((510, 190), (510, 210), (320, 210), (320, 228))
    draw.arrow((435, 280), (402, 280))
    draw.box(
        10, 355, 575, 65, "question",
        "backward: rounding passes the gradient straight through to B and A,",
        "and to the scales; a weight that is clipped gives none to B and A",
    )  # fmt: skip
    for number, (kind, words) in enumerate((("frozen", "frozen"), ("trained", "trained"), ("kept", "saved"))):
        draw.box(650, 302 + 42 * number, 170, 34, kind, words)
    return draw.svg()


def figures() -> dict[str, Any]:
    """What the chart quotes."""
    rows, floats = read([str(path) for path in sorted(RESULTS.glob("accuracy_*.json"))])
    small = [row for row in rows if row.model.startswith("SmolLM2")]
    best = best_of(small)

    def row(method: str, bits: int) -> Row:
        return best[method][bits, 64, bits > 2]

    def share(method: str, bits: int) -> str:
        return f"{100 * recovered(row(method, bits), small, floats, 'report'):.0f} %"

    def run(file: str, place: str = "runs", **wanted: Any) -> dict[str, Any]:
        runs = json.loads((RESULTS / file).read_text(encoding="utf-8"))[place]
        (found,) = [one for one in runs if all((one.get(key) or False) == value for key, value in wanted.items())]
        return found

    peak = {
        name: run("sft.json", method=method, memory=False)["steps"]["4x1024"]["peak_gib"]
        for name, method in (("lora", "LoRA"), ("int4", "LR-QAT int4, groups of 128"))
    }
    experts = {
        name: run("moe.json", method=method, rank=8)["steps"]["4x1024"]["peak_gib"]
        for name, method in (("lora", "LoRA bf16"), ("channel", "LR-QAT int4, groups of 128, by channel"))
    }
    recipe = "block-wise, then scales, KL"
    return {
        "plain": {bits: share("LR-QAT", bits) for bits in (4, 3)},
        "recipe": {bits: share(recipe, bits) for bits in (4, 3, 2)},
        "agree": {name: f"{100 * row(name, 4).mean('report', 'agree'):.1f} %" for name in ("LR-QAT", "LR-QAT, KL")},
        "peak": peak,
        "experts": experts,
        "sr": best["low-bit SR"][8, -1, True].mean("report", "ppl"),
        "full": best["full fine-tuning in float"][4, 64, True].mean("report", "ppl"),
    }


def choose() -> str:
    """Questions down the left side; to the right, what to take if the answer is yes."""
    known = figures()
    steps: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
        (
            ("Must every weight move?", "(pretraining, ternary)"),
            ("*Low-bit SR", "`LowBitSRConfig(bits=8)`",
             f"8 bits: perplexity {known['sr']:.2f}, full fine-tuning in float {known['full']:.2f}"),
        ),
        (
            ("Is the model quantized?", "(GPTQ, AWQ,", "compressed-tensors)"),
            ("*LR-QAT on the grid that it has", "`load_quantized(name), LRQATConfig()`",
             "the first step is the loaded model, bit for bit"),
        ),
        (
            ("Is it a mixture of experts?",),
            ("*LR-QAT, one scale change a channel", '`LRQATConfig(downcast="int", learn_scales="channel")`',
             f"30B: {known['experts']['channel']:.1f} GiB a step, LoRA {known['experts']['lora']:.1f}"),
        ),
        (
            ("Do you want the best file", "that so few bits can hold?"),
            ("*Block-wise, then scales with a teacher", "`preprocess_blockwise; r=0, Distillation`",
             f"recovers {known['recipe'][4]} at 4 bits, {known['recipe'][3]} at 3, {known['recipe'][2]} at 2"),
        ),
        (
            ("Is memory short?",),
            ("*LR-QAT on packed integers", '`LRQATConfig(downcast="int")`',
             f"7B, groups of 128: {known['peak']['int4']:.1f} GiB a step, LoRA {known['peak']['lora']:.1f}"),
        ),
        (
            ("Must a chat model stay", "what it is?"),
            ("*LR-QAT with the float model as teacher", "`callbacks=[Distillation(name)]`",
             f"same next token as in float: {known['agree']['LR-QAT, KL']}, without {known['agree']['LR-QAT']}"),
        ),
    ]  # fmt: skip
    height, gap = 84, 26
    draw = Drawing(780, (len(steps) + 1) * (height + gap), "Which method to choose")
    last = (("None of these",), ("*LR-QAT as it comes", "`LRQATConfig(bits=4, group_size=64)`",
                                 f"recovers {known['plain'][4]} at 4 bits, {known['plain'][3]} at 3"))  # fmt: skip
    for number, (question, leaf) in enumerate([*steps, last]):
        y = 10 + number * (height + gap)
        draw.box(10, y, 250, height, "question", *question)
        draw.box(340, y, 430, height, "kept", *leaf)
        draw.arrow((260, y + height // 2), (338, y + height // 2))
        if number < len(steps):
            draw.sign(296, y + height // 2, "yes", 44)
            draw.arrow((135, y + height), (135, y + height + gap - 2))
    return draw.svg()


DRAWINGS = {"how-it-works.svg": how_it_works, "choose.svg": choose}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(arguments)
    changed = []
    for name, draw in DRAWINGS.items():
        path, new = IMAGES / name, draw()
        if path.exists() and path.read_text(encoding="utf-8") == new:
            continue
        changed.append(name)
        if not args.check:
            path.write_text(new, encoding="utf-8")
    if args.check and changed:
        print("python benchmarks/diagrams.py would change " + ", ".join(changed))
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
