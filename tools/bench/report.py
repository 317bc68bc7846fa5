"""What compare.py found, as a table."""

import statistics

import engines

SPEED = {
    "decode-1": "decode, batch 1",
    "decode-8": "decode, batch 8",
    "prefill-128": "prefill 128",
    "prefill-512": "prefill 512",
    "prefill-2048": "prefill 2,048",
    "stream": "stream",
    "lora": "LoRA",
}
# What else is told, and how: measurement, field, title, format.
OTHER = (
    ("import", "import_s", "import s", "{:.2f}"),
    ("start", "load_s", "load s", "{:.2f}"),
    ("ready", "ready_s", "then first token s", "{:.2f}"),
    ("ready", "of_load", "of load", "{:.1f}"),
    ("start", "first_s", "first answer s", "{:.1f}"),
    ("start", "again_s", "again s", "{:.2f}"),
    ("start", "another_length_s", "other length +s", "{:+.2f}"),
    ("decode-1", "first_token_s", "first token s", "{:.3f}"),
    ("start", "peak_gb", "peak GB", "{:.2f}"),
    ("lora", "peak_gb", "LoRA peak GB", "{:.2f}"),
    ("perplexity", "perplexity", "perplexity", "{:.3f}"),
)


def in_words(result):
    """One measurement in a few words."""
    if "failed" in result:
        return f"FAILED: {result['failed']}"
    hidden = ("what", "versions", "seconds", "ways", "frameworks")
    words = [
        f"{name} {value:.4g}"
        for name, value in result.items()
        if name not in hidden and isinstance(value, int | float)
    ]
    return "  ".join(words)


class Figures:
    """Medians of a run, with the least and the most beside them."""

    def __init__(self, known):
        self.values, self.failures = {}, {}
        for run in known["runs"]:
            key = run["who"], run["what"]
            if "failed" in run:
                self.failures[key] = run["failed"]
                continue
            for field, value in run.items():
                if isinstance(value, int | float) and field != "round":
                    self.values.setdefault((*key, field), []).append(value)
        names = dict.fromkeys(run["who"] for run in known["runs"])
        order = [*engines.VARIANTS, "kerashub", "zeromodels", "transformers"]
        order += ["llama.cpp", "limit", "keras", "command"]
        self.names = sorted(
            names, key=lambda name: order.index(contender_of(name).name)
        )

    def median(self, who, what, field="tokens_per_s"):
        """The median over the rounds, or None."""
        found = self.values.get((str(who), what, field))
        return statistics.median(found) if found else None

    def spread(self, who, what, field="tokens_per_s"):
        """The least and the most, or None where there is but one."""
        found = self.values.get((str(who), what, field), ())
        return (min(found), max(found)) if len(found) > 1 else None


def contender_of(name):
    """The `Contender` that a name tells; names of variants may have several words."""
    *rest, dtype = name.split(" ")
    backend = rest.pop() if rest[-1] in engines.BACKENDS else None
    return engines.Contender(" ".join(rest), backend, dtype)


def limit_of(who, figures, what):
    """Tokens a second that the machine allows a contender, or None."""
    who = contender_of(who)
    if who.name == "limit":
        return None
    return figures.median(f"limit {who.backend} {who.dtype}", what)


def table(known):
    """Markdown: speed with spread and the part of the limit, then everything else."""
    figures = Figures(known)
    lines = [_heading(known), "", *_speed_table(figures), "", *_other_table(figures)]
    lines += ["", *_machine_limits(figures)]
    if figures.failures:
        lines += ["", "Failed:"]
        lines += [f"- {who}, {w}: {f}" for (who, w), f in figures.failures.items()]
    return "\n".join(lines)


def _heading(known):
    machine, found = known["machine"], {}
    for run in known["runs"]:
        found |= run.get("versions", {})
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    rounds = len({run["round"] for run in known["runs"]})
    versions = ", ".join(f"{name} {value}" for name, value in sorted(found.items()))
    return (
        f"Model {known['settings']['model']}, {where}, {machine['memory_gib']} GiB, "
        f"{machine['date']}; medians of {rounds} rounds (least to most).\n{versions}"
    )


def _speed_table(figures):
    whats = [
        what
        for what in SPEED
        if any((who, what, "tokens_per_s") in figures.values for who in figures.names)
    ]
    if not whats:
        return []
    titles = " | ".join(SPEED[what] for what in whats)
    lines = [f"| tokens/s | {titles} |", "| --- |" + " --- |" * len(whats)]
    for who in figures.names:
        cells = [_speed_cell(who, what, figures) for what in whats]
        if any(cells):
            lines.append(f"| {who} | " + " | ".join(cells) + " |")
    return lines


def _speed_cell(who, what, figures):
    rate = figures.median(who, what)
    if rate is None:
        return "failed" if (who, what) in figures.failures else ""
    cell = f"{rate:.1f}"
    if spread := figures.spread(who, what):
        cell += " ({:.1f} to {:.1f})".format(*spread)
    if limit := limit_of(who, figures, what):
        cell += f", {rate / limit:.2f} of limit"
    if what == "stream":
        cell += f", {figures.median(who, what, 'of_generate'):.2f} of generate"
    return cell


def _other_table(figures):
    there = [
        (what, field, title, form)
        for what, field, title, form in OTHER
        if any((who, what, field) in figures.values for who in figures.names)
    ]
    if not there:
        return []
    lines = ["| | " + " | ".join(title for _, _, title, _ in there) + " |"]
    lines.append("| --- |" + " --- |" * len(there))
    for who in figures.names:
        cells = []
        for what, field, _, form in there:
            value = figures.median(who, what, field)
            cells.append("" if value is None else form.format(value))
        if any(cells):
            lines.append(f"| {who} | " + " | ".join(cells) + " |")
    return lines


def _machine_limits(figures):
    """Bandwidth and operations that the products alone reached."""
    lines = []
    for who in figures.names:
        if contender_of(who).name != "limit":
            continue
        told = []
        if rate := figures.median(who, "decode-1"):
            size = figures.median(who, "decode-1", "gb_read")
            told.append(f"{size:.3f} GB a token, at {size * rate:.1f} GB/s")
        if rate := figures.median(who, "prefill-512"):
            work = figures.median(who, "prefill-512", "gflop")
            told.append(f"{work * rate / 512:.0f} GFLOP/s with 512 rows")
        if told:
            lines.append(f"- {who}: {', '.join(told)}")
    return lines
