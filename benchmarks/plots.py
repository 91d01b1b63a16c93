"""Pictures of a result, each as PNG and SVG: `overview`, the share of the limit of every op and
provider, and `attention`, its rate over the sequence's length."""

import io
import statistics
from pathlib import Path

from llama_ext.files import write_atomically

OURS, COLOUR = "llama_ext", "#c0392b"
GREYS = ("#1f4e79", "#5b8db8", "#7f8c8d", "#8e6bb0", "#4d9078", "#b8860b", "#34495e", "#95a5a6")
MARKERS = "osD^vP*Xhp<>"


def draw(about, rows, folder):
    """Write the pictures that the rows allow into `folder`, which is made; the paths written."""
    rows = [row for row in rows if row["providers"]]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"overview": overview(about, rows)} if rows else {}
    if sweeps := attention_over_length(rows):
        figures["attention"] = attention(about, sweeps)
    written = []
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            data = io.BytesIO()
            figure.savefig(data, format=kind, dpi=130)
            written.append(folder / f"{name}.{kind}")
            write_atomically(written[-1], data.getvalue())
    return written


def attention_over_length(rows):
    """{(dtype, head dim, heads): rows of causal attention} where there are several lengths."""
    found = {}
    for row in rows:
        o = row.get("options")
        if row["op"] == "attention" and o and o["T"] == o["S"] and o["H"] == o["Hkv"]:
            found.setdefault((row["dtype"], o["D"], o["H"]), []).append(row)
    return {panel: each for panel, each in found.items()
            if len({row["options"]["T"] for row in each}) > 1}


def _figure(about, width, height, rows, columns, **options):
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    label = ": MODELLED, not timed" if about.get("virtual") else ""
    figure.suptitle(f"{about['device']}{label}\nllama_ext {about['llama_ext']}, torch "
                    f"{about['torch']}, {about['date'][:10]}", fontsize=9)
    return figure, axes


def _style(names):
    """{provider: its colour, marker, size and order}: ours stands out."""
    peers = [name for name in names if name != OURS]
    styles = {name: {"color": GREYS[i % len(GREYS)], "marker": MARKERS[1 + i % (len(MARKERS) - 1)],
                     "markersize": 5, "zorder": 3} for i, name in enumerate(peers)}
    if OURS in names:
        styles[OURS] = {"color": COLOUR, "marker": MARKERS[0], "markersize": 9, "zorder": 4}
    return styles


def _names(rows):
    return list(dict.fromkeys(name for row in rows for name in row["providers"]))


def shares(rows, dtype, direction):
    """{op: {provider: its share of the limit in per cent, the geometric mean over the shapes that
    all of the op's providers in `rows` have}}."""
    found = {}
    for row in rows:
        if (row["dtype"], row["direction"]) == (dtype, direction):
            for name, entry in row["providers"].items():
                found.setdefault(row["op"], {}).setdefault(name, {})[row["shape"]] = entry["share"]
    means = {}
    for op, each in found.items():
        common = set.intersection(*(set(by_shape) for by_shape in each.values()))
        means[op] = {name: 100 * statistics.geometric_mean(
            by_shape[shape] for shape in common or by_shape) for name, by_shape in each.items()}
    return means


def overview(about, rows):
    """A row of dots for each op, a panel for each dtype and direction."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    ops = list(dict.fromkeys(row["op"] for row in rows))
    names = _names(rows)
    styles = _style(names)
    highest = 100
    figure, axes = _figure(about, 2 + 3.4 * len(directions),
                           1.6 + (0.5 + 0.42 * len(ops)) * len(dtypes), len(dtypes),
                           len(directions), sharex=True, sharey=True)
    for line, dtype in zip(axes, dtypes):
        for axis, direction in zip(line, directions):
            for op, each in shares(rows, dtype, direction).items():
                y = ops.index(op)
                axis.plot([min(each.values()), max(each.values())], [y, y], color="#dddddd",
                          linewidth=4, zorder=1)
                highest = max(highest, *each.values())
                for name, share in each.items():
                    axis.plot(share, y, linestyle="none", **styles[name])
            axis.axvline(100, color="black", linewidth=0.8, linestyle=":")
            axis.set_title(f"{direction}, {dtype}", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.set_yticks(range(len(ops)), ops)
            axis.set_ylim(len(ops) - 0.5, -0.5)
    axes[0][0].set_xlim(0, 1.05 * highest)  # of all, they share it
    axes[-1][len(directions) // 2].set_xlabel(
        "% of the limit (copy bandwidth or matrix product); geometric mean over shapes", fontsize=8)
    _legend(figure, names, styles)
    return figure


def attention(about, sweeps):
    """FLOP/s over T, a line for each provider, a panel for each sweep and direction."""
    rows = [row for each in sweeps.values() for row in each]
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    names = _names(rows)
    styles = _style(names)
    figure, axes = _figure(about, 2 + 3.4 * len(directions), 1.4 + 2.4 * len(sweeps), len(sweeps),
                           len(directions), sharex=True, sharey="row")
    fastest = max(entry["rate"] for row in rows for entry in row["providers"].values())
    scale, unit = (1e12, "TFLOP/s") if fastest >= 1e12 else (1e9, "GFLOP/s")
    lengths = sorted({row["options"]["T"] for row in rows})
    for line, ((dtype, D, H), each) in zip(axes, sweeps.items()):
        highest = 0
        for axis, direction in zip(line, directions):
            for name in names:
                points = sorted((row["options"]["T"], row["providers"][name]["rate"] / scale)
                                for row in each
                                if row["direction"] == direction and name in row["providers"])
                if points:
                    highest = max(highest, *(rate for _, rate in points))
                    axis.plot(*zip(*points), linewidth=2.5 if name == OURS else 1.2,
                              **styles[name])
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{T:,}" for T in lengths])
            axis.set_title(f"{direction}, {dtype}, {H} heads, d{D}", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
        line[0].set_ylim(0, 1.08 * highest)
        line[0].set_ylabel(unit, fontsize=8)
    axes[-1][len(directions) // 2].set_xlabel("causal attention: tokens in a sequence", fontsize=8)
    _legend(figure, names, styles)
    return figure


def _legend(figure, names, styles):
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linestyle="none", label=name, **styles[name]) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 6), fontsize=8)
