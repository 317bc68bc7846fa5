"""The report of a run: everything is in it, and nothing is fetched."""

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from gemma_keras.sft import charts
from gemma_keras.sft.report import smoothed, write_report

pytestmark = pytest.mark.any_backend


@pytest.fixture
def folder(tmp_path):
    header = "step,epoch,loss,learning_rate,tokens_per_second,tokens_seen,seconds"
    lines = [f"{header},peak_memory_gb,val_loss,val_perplexity"]
    for step in range(1, 41):
        val = "1.5,4.4817" if step % 10 == 0 else ","
        row = f"{step},{step / 10},{4 / step},1e-3,100.0,{step * 50},{step},1.5,{val}"
        lines.append(row)
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    sample = {"step": 5, "prompt": "<b>?", "text": "a & b </script>"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (tmp_path / "config.yaml").write_text("seed: 3\npacking: true\nvalidation: []\n")
    run = {"status": "finished", "title": "my <run>", "versions": {"keras": "3.15.1"}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    return tmp_path


def test_it_is_one_file_that_fetches_nothing(folder):
    page = write_report(folder).read_text("utf-8")
    assert not re.search(r"(?i)https?://|src=|href=|@import|url\(|<script|<link", page)
    assert "my &lt;run&gt;" in page
    assert "&lt;b&gt;?" in page
    assert "a &amp; b &lt;/script&gt;" in page
    for text in ("seed", "3.15.1", "step 10", "finished", "4.482 at step 10"):
        assert text in page
    assert "validation" in page


def test_what_validation_found_before_training_comes_first(folder):
    run = json.loads((folder / "run.json").read_text())
    run["before"] = {"val_loss": 2.5, "val_perplexity": 12.182}
    (folder / "run.json").write_text(json.dumps(run))
    page = write_report(folder).read_text("utf-8")
    assert "12.182 → 4.482 at step 10" in page
    figure = ElementTree.fromstring(re.search(r"<svg.*?</svg>", page)[0])
    *_, validation = figure.findall("polyline")
    places = [tuple(map(float, p.split(","))) for p in validation.get("points").split()]
    # Worse is higher up, where y is smaller.
    assert len(places) == 5
    assert places[0][0] < places[1][0] and places[0][1] < places[1][1]


def test_answers_stand_beside_what_they_should_be(folder):
    run = json.loads((folder / "run.json").read_text())
    for when, text in (("before", "<i>"), ("after", "four")):
        line = {"prompt": "two and two?", "reference": "four", "text": text}
        (folder / f"answers_{when}.jsonl").write_text(json.dumps(line) + "\n")
    counts = {"before": {"right": 0, "asked": 1}, "after": {"right": 1, "asked": 1}}
    (folder / "run.json").write_text(json.dumps({**run, "exact_match": counts}))
    page = write_report(folder).read_text("utf-8")
    assert "0 → 1 of 1" in page
    cells = "<td>two and two?</td><td>four</td><td>&lt;i&gt;</td><td>four</td>"
    assert cells in page


def test_its_curves_are_where_the_numbers_are(folder):
    page = write_report(folder).read_text("utf-8")
    figures = [ElementTree.fromstring(f) for f in re.findall(r"<svg.*?</svg>", page)]
    assert len(figures) == 4
    raw, _, validation = figures[0].findall("polyline")
    places = [tuple(map(float, p.split(","))) for p in raw.get("points").split()]
    xs, ys = zip(*places, strict=True)
    assert len(places) == 40
    # Steps go to the right, evenly; the loss 4 / step falls, to scale.
    gaps = [b - a for a, b in itertools.pairwise(xs)]
    assert max(gaps) - min(gaps) < 0.21
    assert (ys[3] - ys[0]) / (ys[1] - ys[0]) == pytest.approx(3.0 / 2.0, rel=0.01)
    assert len(validation.get("points").split()) == 4
    for x, y in places:
        assert charts.LEFT <= x <= charts.WIDTH - charts.RIGHT
        assert charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM


@pytest.mark.parametrize(
    "points",
    [[(1, 2.0)], [(1, 0.0), (2, 0.0)], [(1, 1e-8), (2, 3e9)], [(1, -2.0), (2, -1.0)]],
)
def test_any_numbers_make_a_chart(points):
    drawn = charts.chart("x", [("one", "", points)])
    (svg,) = re.findall(r"<svg.*?</svg>", drawn)
    assert ElementTree.fromstring(svg).findall("polyline")


def test_nothing_to_draw_draws_nothing():
    assert charts.chart("x", [("one", "", [])]) == ""
    assert charts.chart("x", [("one", "", [(1, float("nan"))])]) == ""


def test_smoothing_is_the_mean_of_the_last_tenth():
    points = [(step, float(step)) for step in range(1, 41)]
    assert smoothed(points)[-1] == (40, (37 + 38 + 39 + 40) / 4)
    assert smoothed(points[:9]) == []
