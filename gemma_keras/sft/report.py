"""The report of a run: one HTML file that needs nothing else.

It is made of the files in the run's folder alone, and can be made at any time.
"""

import csv
import html
import json
import pathlib

from gemma_keras.sft.charts import chart

_ANSWERS_SHOWN = 20
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #667085; --line: #d9dee6;
  --page: #ffffff; --card: #f6f8fa; --one: #1f6feb; --two: #d1480b; --faint: #9cc2f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #98a2b3;
  --line: #333c49; --page: #14181e; --card: #1c222b; --one: #58a6ff; --two: #ff9b5c;
  --faint: #2f5b93; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; padding: 0; list-style: none; }
.facts li { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .5rem .9rem; } .facts b { display: block; font-size: 1.15rem; }
.facts span, figcaption, .soft { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr));
  gap: 1rem; } figure { margin: 0; background: var(--card); border-radius: 8px;
  border: 1px solid var(--line); padding: .6rem; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left;
  vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } td { overflow-wrap: anywhere;
  white-space: pre-wrap; } .key { width: 14rem; }
@media (max-width: 30rem) { .charts { grid-template-columns: 1fr; } }
"""


def write_report(folder):
    """Writes `report.html` into a run's folder, of what else is there.

    Args:
        folder: holds `metrics.csv`, and perhaps `run.json`, `config.yaml`,
            `samples.jsonl`, `answers_before.jsonl` and `answers_after.jsonl`.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: there is no `metrics.csv`.
    """
    folder = pathlib.Path(folder)
    rows = read_metrics(folder / "metrics.csv")
    run = _read_json(folder / "run.json")
    parts = [
        f"<h1>{html.escape(run.get('title', folder.resolve().name))}</h1>",
        _facts(rows, run),
        "<h2>Curves</h2>",
        _charts(rows, run.get("before")),
        _samples(folder / "samples.jsonl"),
        _answers(folder),
        _table("Config", _read_config(folder / "config.yaml")),
        _table("Data", {d["path"]: d["found"] for d in run.get("data", [])}),
        _table("Versions", run.get("versions", {})),
    ]
    title = html.escape(run.get("title", folder.resolve().name))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )
    target = folder / "report.html"
    partial = folder / ".report.html.partial"
    partial.write_text(page, "utf-8")
    partial.replace(target)
    return target


def read_metrics(path):
    """Rows of a metrics.csv: dicts of numbers, without what was not measured."""
    with pathlib.Path(path).open(newline="", encoding="utf-8") as file:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def _read_json(path):
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def _read_config(path):
    if not path.exists():
        return {}
    import yaml

    values = yaml.safe_load(path.read_text("utf-8"))
    return {name: value for name, value in values.items() if value not in (None, [])}


def _facts(rows, run):
    facts = [("state", run.get("status", "unknown"))]
    if rows:
        last = rows[-1]
        facts += [("steps", f"{int(last['step']):,}")]
        facts += [("loss", f"{rows[0]['loss']:.3f} → {last['loss']:.3f}")]
    measured = [row for row in rows if "val_loss" in row]
    if measured:
        best = min(measured, key=lambda row: row["val_loss"])
        value = f"{best['val_perplexity']:.3f} at step {int(best['step']):,}"
        if run.get("before"):
            value = f"{run['before']['val_perplexity']:.3f} → {value}"
        facts += [("best validation perplexity", value)]
    if run.get("exact_match"):
        found = run["exact_match"]
        counts = " → ".join(f"{each['right']:,}" for each in found.values())
        asked = next(iter(found.values()))["asked"]
        facts += [("answers right to the letter", f"{counts} of {asked:,}")]
    if rows and "tokens_seen" in rows[-1]:
        facts += [("tokens seen", f"{int(rows[-1]['tokens_seen']):,}")]
    if rows:
        facts += [("training time", f"{rows[-1]['seconds']:,.0f} s")]
        facts += [("peak memory", f"{max(r['peak_memory_gb'] for r in rows):.2f} GB")]
    if "trainable" in run:
        share = f"{run['trainable']:,} of {run['parameters']:,}"
        facts += [("parameters trained", share)]
    items = "".join(
        f"<li><span>{html.escape(name)}</span><b>{html.escape(str(value))}</b></li>"
        for name, value in facts
    )
    return f'<ul class="facts">{items}</ul>'


def _charts(rows, before):
    # What validation found before training is the curve's point at step 0.
    measured = [{"step": 0, **(before or {})}, *rows]

    def series(name):
        return [(row["step"], row[name]) for row in measured if name in row]

    loss = series("loss")
    drawn = [
        chart(
            "Loss, nats a token",
            [
                ("faint", "each step", loss),
                ("one", "smoothed", smoothed(loss)),
                ("two", "validation", series("val_loss")),
            ],
        ),
        chart("Learning rate", [("one", "", series("learning_rate"))]),
        chart("Tokens a second", [("one", "", series("tokens_per_second"))]),
        chart("Peak memory, GB", [("one", "", series("peak_memory_gb"))]),
    ]
    if any("accuracy" in row for row in rows):
        drawn.insert(
            1,
            chart(
                "Accuracy of the next token",
                [
                    ("faint", "each step", series("accuracy")),
                    ("one", "smoothed", smoothed(series("accuracy"))),
                    ("two", "validation", series("val_accuracy")),
                ],
            ),
        )
    return f'<div class="charts">{"".join(drawn)}</div>'


def smoothed(points):
    """The mean of the last tenth of the points, at each of them."""
    window = max(1, len(points) // 10)
    if window < 3:
        return []
    found = []
    for i in range(len(points)):
        part = [y for _, y in points[max(0, i + 1 - window) : i + 1]]
        found.append((points[i][0], sum(part) / len(part)))
    return found


def _samples(path):
    if not path.exists():
        return ""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    by_prompt = {}
    for line in lines:
        by_prompt.setdefault(line["prompt"], []).append(line)
    parts = []
    for prompt, found in by_prompt.items():
        rows = "".join(
            f"<tr><td class='key'>step {line['step']:,}</td>"
            f"<td>{html.escape(line['text'].strip())}</td></tr>"
            for line in found
        )
        parts.append(f"<h3>{html.escape(prompt)}</h3><table>{rows}</table>")
    return "<h2>Samples</h2>" + "".join(parts) if parts else ""


def _answers(folder):
    """The first answers that were compared with references, before and after."""
    files = {when: folder / f"answers_{when}.jsonl" for when in ("before", "after")}
    found = {
        when: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for when, path in files.items()
        if path.exists()
    }
    if not found:
        return ""
    heads = ["prompt", "reference", *found]
    rows = []
    for answers in list(zip(*found.values(), strict=False))[:_ANSWERS_SHOWN]:
        cells = [answers[0]["prompt"], answers[0]["reference"]]
        cells += [answer["text"] for answer in answers]
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr>{cells}</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<h2>Answers</h2><table><tr>{head}</tr>{''.join(rows)}</table>"


def _table(title, values):
    if not values:
        return ""
    rows = "".join(
        f"<tr><th class='key'>{html.escape(str(name))}</th>"
        f"<td>{html.escape(_shown(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<h2>{title}</h2><table>{rows}</table>"


def _shown(value):
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return (
        {True: "yes", False: "no"}.get(value, str(value))
        if isinstance(value, bool)
        else str(value)
    )
