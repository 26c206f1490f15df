"""Draws the pictures of docs/how-it-works.md: python docs/drawings/draw.py

Every picture has a background of its own, so it is readable on any page; its colors follow the reader's system.
"""

from pathlib import Path

HERE = Path(__file__).parent
# one color for one thing: latents, rotary parts, queries, weights, what is chosen
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "faint": "#57606a",
    "line": "#8c959f",
    "latent": "#b6d7ff",
    "rotary": "#ffd8a8",
    "query": "#d3f0d0",
    "weight": "#e6e1f5",
    "plain": "#eef1f4",
    "chosen": "#2f6fdb",
    "unchosen": "#c9d1d9",
}
DARK = {
    "paper": "#161b22",
    "ink": "#e6edf3",
    "faint": "#9aa5b1",
    "line": "#6e7681",
    "latent": "#1f4b80",
    "rotary": "#7a4a10",
    "query": "#22562b",
    "weight": "#453a70",
    "plain": "#262d36",
    "chosen": "#6ea8fe",
    "unchosen": "#3d444d",
}
TITLES = {
    "attention": "The expanded and the absorbed form of Multi-head Latent Attention",
    "cache": "The size of a cached token",
    "routing": "How DeepSeekMoE chooses experts for a token",
}


def style(colors: dict[str, str]) -> str:
    rules = [f".{name}{{fill:{colors[name]}}}" for name in colors]
    rules += [f".frame-{name}{{stroke:{colors[name]}}}" for name in ("chosen", "unchosen")]
    return "".join(rules) + f".edge{{stroke:{colors['line']}}}.arrow{{stroke:{colors['faint']}}}"


def picture(name: str, width: int, height: int, parts: list[str]) -> str:
    tip = '<path d="M0,0 L8,4 L0,8 z" class="faint"/>'
    marker = f'<marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">{tip}</marker>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="14">\n'
        f"<title>{TITLES[name]}</title>\n"
        f"<style>{style(LIGHT)}@media (prefers-color-scheme:dark){{{style(DARK)}}}</style>\n"
        f"<defs>{marker}</defs>\n"
        f'<rect width="{width}" height="{height}" rx="10" class="paper"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(x, y, words, *, kind="ink", size=14, anchor="middle", bold=False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" class="{kind}" font-size="{size}" text-anchor="{anchor}"{weight}>{words}</text>'


def box(x, y, w, h, kind, *lines) -> str:
    parts = [f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" class="{kind} edge"/>']
    first = y + h / 2 + 5 - 9 * (len(lines) - 1)
    parts += [
        text(x + w / 2, first + 18 * i, line, size=14 if i == 0 else 12, kind="ink") for i, line in enumerate(lines)
    ]
    return "\n".join(parts)


def arrow(*points: tuple[float, float]) -> str:
    path = "M" + " L".join(f"{x},{y}" for x, y in points)
    return f'<path d="{path}" fill="none" class="arrow" stroke-width="1.6" marker-end="url(#tip)"/>'


def attention() -> str:
    """The names are those of `deepseek_latent/attention/ops.py`."""
    parts = [
        text(240, 34, "Expanded: for many new tokens (a prompt)", size=17, bold=True),
        text(720, 34, "Absorbed: for few new tokens (decoding)", size=17, bold=True),
        '<path d="M480,54 L480,606" class="edge" stroke-dasharray="4 5"/>',
        text(
            480,
            646,
            "q_content &#183; (w_uk latent) = (q_content w_uk) &#183; latent, so both give the same result",
            size=15,
        ),
    ]
    for x in (0, 480):
        parts += [
            text(x + 125, 70, "cached, once for all heads", kind="faint", size=12),
            box(x + 20, 78, 125, 46, "latent", "latent", "c elements"),
            box(x + 145, 78, 90, 46, "rotary", "k_rotary", "r elements"),
            text(x + 364, 70, "a new token, for each head", kind="faint", size=12),
            box(x + 275, 78, 100, 46, "query", "q_content", "n elements"),
            box(x + 375, 78, 80, 46, "rotary", "q_rotary", "r elements"),
            arrow((x + 200, 124), (x + 200, 326)),
            arrow((x + 415, 124), (x + 415, 326)),
            arrow((x + 310, 374), (x + 310, 420)),
            box(x + 250, 560, 120, 38, "weight", "o_proj"),
        ]
    expanded = [
        arrow((97, 124), (97, 156)),
        box(20, 156, 155, 46, "weight", "w_uk and w_uv", "for all cached tokens"),
        arrow((55, 202), (55, 234)),
        arrow((138, 202), (138, 234)),
        box(20, 234, 72, 46, "plain", "values", "v per head"),
        box(102, 234, 73, 46, "plain", "keys", "n per head"),
        arrow((325, 124), (325, 326)),
        box(165, 328, 290, 46, "plain", "softmax of q_content &#183; keys", "+ q_rotary &#183; k_rotary"),
        arrow((138, 280), (138, 351), (164, 351)),
        arrow((55, 280), (55, 443), (164, 443)),
        box(165, 420, 290, 46, "plain", "weighted sum of values", "v per head"),
        arrow((310, 466), (310, 560)),
    ]
    absorbed = [
        arrow((805, 124), (805, 156)),
        box(745, 156, 120, 46, "weight", "w_uk", "for new tokens"),
        arrow((805, 202), (805, 234)),
        box(745, 234, 120, 46, "latent", "q_absorbed", "c per head"),
        arrow((805, 280), (805, 326)),
        box(645, 328, 290, 46, "plain", "softmax of q_absorbed &#183; latent", "+ q_rotary &#183; k_rotary"),
        arrow((590, 124), (590, 351), (644, 351)),
        arrow((535, 124), (535, 443), (644, 443)),
        box(645, 420, 290, 46, "latent", "weighted sum of latents", "c per head"),
        arrow((790, 466), (790, 494)),
        box(730, 494, 120, 38, "weight", "w_uv"),
        arrow((790, 532), (790, 560)),
    ]
    return picture("attention", 960, 668, parts + expanded + absorbed)


def bar(x: float, y: float, *segments: tuple[str, float]) -> str:
    """Segments (color, width) side by side."""
    drawn = []
    for kind, width in segments:
        drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="26" class="{kind} edge"/>')
        x += width
    return "\n".join(drawn)


def cache() -> str:
    elements, left = 880 / (128 * (128 + 64 + 128)), 40
    keys, values = 128 * (128 + 64) * elements, 128 * 128 * elements
    parts = [
        text(left, 34, "One token in one layer of DeepSeek-V2, in elements", size=17, anchor="start", bold=True),
        text(left, 62, "keys and values of 128 heads: 40,960", anchor="start"),
        bar(left, 72, ("plain", keys), ("plain", values)),
        text(left + keys / 2, 90, "128 keys of 192", size=13),
        text(left + keys + values / 2, 90, "128 values of 128", size=13),
        text(left, 126, "latent and rotary key: 576, which is 71 times less", anchor="start"),
        bar(left, 136, ("latent", 512 * elements), ("rotary", 64 * elements)),
        text(left, 206, "The same 576 elements, in bytes", size=17, anchor="start", bold=True),
    ]
    scale = 640 / 1152
    # codes of the latent, scales of 128 codes each, rotary key in bfloat16
    for row, (name, codes, scales) in enumerate(
        [("bfloat16", 1024, 0), ("fp8", 512, 16), ("int8", 512, 8), ("int6", 384, 8), ("int4", 256, 8)]
    ):
        y, total = 226 + 38 * row, codes + scales + 128
        parts += [
            text(left + 70, y + 18, name, anchor="end"),
            bar(left + 84, y, ("latent", codes * scale), ("weight", scales * scale), ("rotary", 128 * scale)),
            text(left + 96 + total * scale, y + 18, f"{total:,}", anchor="start"),
        ]
    legend = [("latent", "latent: 512"), ("weight", "scales"), ("rotary", "rotary key: 64")]
    for row, (kind, words) in enumerate(legend):
        parts += [
            f'<rect x="740" y="{332 + 26 * row}" width="18" height="16" class="{kind} edge"/>',
            text(768, 345 + 26 * row, words, anchor="start", size=13),
        ]
    return picture("cache", 960, 434, parts)


AFFINITIES = [[0.03, 0.11, 0.02, 0.04], [0.05, 0.05, 0.06, 0.05], [0.16, 0.02, 0.10, 0.02], [0.02, 0.03, 0.09, 0.15]]
KEPT_GROUPS, EXPERTS_PER_TOKEN = 2, 4


def routing() -> str:
    best = sorted(range(4), key=lambda group: max(AFFINITIES[group]))[-KEPT_GROUPS:]
    inside = sorted(((AFFINITIES[g][i], g, i) for g in best for i in range(4)), reverse=True)
    chosen = {(g, i) for _, g, i in inside[:EXPERTS_PER_TOKEN]}
    assert abs(sum(map(sum, AFFINITIES)) - 1) < 1e-9
    parts = [
        text(30, 34, "One token, 16 routed experts in 4 groups, 2 shared experts", size=17, anchor="start", bold=True),
        box(30, 120, 110, 46, "query", "u", "the token"),
        text(30, 64, "1. The router gives each expert an affinity:", anchor="start"),
        text(30, 84, "softmax over all of u &#183; e", anchor="start", kind="faint", size=13),
    ]
    top, floor = 110, 250
    for g, row in enumerate(AFFINITIES):
        x = 330 + 152 * g
        frame = "chosen" if g in best else "unchosen"
        parts.append(
            f'<rect x="{x}" y="{top - 14}" width="140" height="{floor - top + 24}" rx="6" fill="none" '
            f'class="frame-{frame}" stroke-width="2"/>'
        )
        for i, affinity in enumerate(row):
            kind = "chosen" if (g, i) in chosen else "unchosen"
            height, left = affinity * 740, x + 10 + 31 * i
            parts += [
                f'<rect x="{left}" y="{floor - height:.1f}" width="26" height="{height:.1f}" class="{kind}"/>',
                text(left + 13, round(floor - height - 5, 1), f"{affinity:.2f}".lstrip("0"), size=11, kind="faint"),
                box(left - 1, 330, 28, 30, "plain", ""),
            ]
            if (g, i) in chosen:
                parts += [
                    f'<rect x="{left - 1}" y="330" width="28" height="30" rx="5" class="chosen"/>',
                    arrow((left + 13, 262), (left + 13, 328)),
                    arrow((left + 13, 360), (left + 13, 418)),
                ]
        words = f"best: {max(row):.2f}".replace("0.", ".") + (", kept" if g in best else ", left out")
        parts.append(text(x + 70, 284 if g not in best else 88, words, size=13, kind="ink" if g in best else "faint"))
    parts += [
        arrow((140, 143), (326, 143)),
        text(30, 222, "2. The groups of the best experts stay,", anchor="start"),
        text(30, 242, "here 2 of 4. A group is on one device.", anchor="start", kind="faint", size=13),
        text(30, 284, "3. The best experts in these groups", anchor="start"),
        text(30, 304, "compute, here 4. The .11 is left out.", anchor="start", kind="faint", size=13),
        box(30, 330, 60, 30, "weight", ""),
        box(98, 330, 60, 30, "weight", ""),
        text(170, 350, "shared: always compute", anchor="start", size=13),
        arrow((60, 360), (60, 418)),
        arrow((128, 360), (128, 418)),
        box(
            30,
            420,
            904,
            46,
            "plain",
            "shared experts(u) + factor &#215; sum over the chosen of affinity &#215; expert(u)",
        ),
        text(
            30,
            496,
            "4. The outputs are added. The affinities are used as they are; the factor is routed_scaling_factor.",
            anchor="start",
        ),
    ]
    return picture("routing", 960, 516, parts)


if __name__ == "__main__":
    for draw in (attention, cache, routing):
        (HERE / f"{draw.__name__}.svg").write_text(draw(), encoding="utf-8")
