"""What the rows of a comparison allow to say: the table against EW, the conflicts, and sentences.

Owns the tests for several comparisons at once (Holm) and the words. Rows and paired differences are
those of `rep_mtl.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from repmtl_ray.studies.rep_mtl import Row, compare, spread

REFERENCE = "EW"
LEVEL = 0.05
MIN_SEEDS = 3
"""With fewer of them nothing is concluded."""


def comparison_table(rows: Sequence[Row]) -> list[list[str]]:
    """Methods by metrics, paired difference from EW in points of delta_p, its test, and time."""
    names = list(rows[0].metrics)
    adjusted = _adjusted(rows)
    table = [["method", "seeds", *names, f"delta_p - {REFERENCE}", "p", "p (Holm)", "time / EW"]]
    times = {v: median(r.seconds for r in rows if r.variant == v) for v in _variants(rows)}
    for variant in _variants(rows):
        own = [row for row in rows if row.variant == variant]
        line = [variant, str(len(own))]
        line += [spread([row.metrics[name] for row in own]) for name in names]
        found = compare(rows, variant, REFERENCE, baseline=REFERENCE)
        if variant == REFERENCE or found is None:
            line += ["", "", ""]
        else:
            deviation = "n/a" if found.deviation is None else f"{found.deviation:.2f}"
            line.append(f"{found.mean:+.2f} ± {deviation}")
            line.append("n/a" if found.p_value is None else f"{found.p_value:.2g}")
            line.append(f"{adjusted[variant]:.2g}" if variant in adjusted else "n/a")
        # The first run of a process loads libraries: a median of fewer says nothing.
        few = len(own) < MIN_SEEDS
        table.append([*line, "n/a" if few else f"{times[variant] / times[REFERENCE]:.2f}"])
    return table


def conflict_table(rows: Sequence[Row]) -> list[list[str]]:
    """Pairs of tasks: how their gradients at the shared parameters of EW agree, after training."""
    seen = [row.diagnostics for row in rows if row.variant == REFERENCE]
    pairs = [name.removeprefix("cosine/") for name in seen[0] if name.startswith("cosine/")]
    table = [["tasks", "cosine", "batches in conflict", "ratio of lengths"]]
    for pair in pairs:
        values = [
            fmean(d[f"{kind}/{pair}"] for d in seen) for kind in ("cosine", "conflict", "length")
        ]
        table.append([pair, f"{values[0]:+.2f}", f"{100 * values[1]:.0f} %", f"{values[2]:.2g}"])
    return table


def conclusions(rows: Sequence[Row]) -> list[str]:
    """What the rows allow to say, in sentences."""
    adjusted = _adjusted(rows)
    others = [name for name in _variants(rows) if name != REFERENCE]
    few = [name for name in others if len([r for r in rows if r.variant == name]) < MIN_SEEDS]
    found = []
    if few:
        found.append(
            f"Nothing may be concluded on {', '.join(few)}: there are fewer than {MIN_SEEDS} seeds. Raise the budget."
        )
    better: list[str] = []
    worse: list[str] = []
    equal: list[str] = []
    for name in others:
        against = compare(rows, name, REFERENCE, baseline=REFERENCE)
        if name in few or against is None:
            continue
        text = f"{name} ({against.mean:+.2f} ± {against.deviation or 0:.2f} points)"
        if adjusted.get(name, 1.0) >= LEVEL:
            equal.append(text)
        else:
            (better if against.mean > 0 else worse).append(text)
    if better:
        found.append(f"Better than {REFERENCE}: {', '.join(better)}.")
    if worse:
        found.append(f"Worse than {REFERENCE}: {', '.join(worse)}.")
    if equal:
        found.append(
            f"No difference from {REFERENCE} was found for {', '.join(equal)}. That is no proof of equality: "
            "a difference well below the deviation over seeds cannot be seen with so many seeds."
        )
    if others and not better and not few:
        found.append(
            f"Nothing here speaks against {REFERENCE}, the cheapest; more seeds, or tuning the learning "
            "rate of every method alike, may still show a difference."
        )
    return found


def _variants(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.variant for row in rows))


def _adjusted(rows: Sequence[Row]) -> dict[str, float]:
    """By method, the p-value against EW for as many comparisons as there are, by Holm."""
    raw = {}
    for variant in _variants(rows):
        found = compare(rows, variant, REFERENCE, baseline=REFERENCE)
        if variant != REFERENCE and found is not None and found.p_value is not None:
            raw[variant] = found.p_value
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p_value) in enumerate(sorted(raw.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(raw) - rank) * p_value))
        adjusted[name] = largest
    return adjusted
