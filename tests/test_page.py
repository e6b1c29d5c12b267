"""The report of a run: complete, of one file, safe against what data hold, and without an error in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from run_cases import STEPS, config, metrics, summary

from limoe import cli
from limoe.report.curves import POINTS, SNAPSHOTS, read_curves
from limoe.report.page import write_report
from limoe.workdir.folder import Workdir

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a page refers to, how often each element is there, and its text."""

    def __init__(self, html):
        super().__init__()
        self.references, self.elements, self.classes, self.text = [], {}, {}, ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements[tag] = self.elements.get(tag, 0) + 1
        for name, value in attributes:
            if name in ("src", "href"):
                self.references.append(value)
            if name == "class":
                for one in value.split():
                    self.classes[one] = self.classes.get(one, 0) + 1

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def html(finished, tmp_path_factory):
    path = write_report(finished.folder, tmp_path_factory.mktemp("report") / "page.html", say=print)
    return path.read_text(encoding="utf-8")


def charts_of(html):
    return json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', html)[1])


def test_the_page_has_everything_and_needs_nothing(finished, html):
    page, facts = Page(html), summary(finished.folder)
    anchors = {name for name in page.references if name.startswith("#")}
    assert all(name.startswith("data:") for name in set(page.references) - anchors)
    assert anchors == {f"#{name}" for name in re.findall(r'<section id="([\w-]+)">', html)} and len(anchors) == 8
    assert "default-src 'none'" in html and "url(" not in html and "@import" not in html
    # Loss, gradient, rate, scale and speed of the model, which was not evaluated; five figures of the layer of experts.
    charts = charts_of(html)
    assert page.classes["chart"] == len(charts) == 5 + 5
    last = {one["name"]: one["value"][-1] for one in charts[0]["series"]}
    assert last == {
        name: pytest.approx(metrics(finished.folder)[-1][name], rel=1e-3) for name in ("total", "contrastive")
    }
    assert page.classes["map"] == 2  # experts of one layer, and the confusion
    figures = {path.stem for path in (finished.folder / "figures").iterdir()}
    assert page.elements["img"] == len(figures) + 6 * 5 + 6
    for shown in (
        f"{facts['zero_shot_top1']:.1%}",
        "480 images were given",
        "model.num_experts",
        "jax 0.",
        "0 examples of",
    ):
        assert shown in page.text, shown
    assert f"{facts['parameters_total']:,}" in page.text and "finished" in page.text


def test_the_confusion_counts_what_the_summary_does(finished, html):
    right, total = re.search(r"([\d,]+) of ([\d,]+) images were given their own class", html).groups()
    assert int(right) / int(total) == pytest.approx(summary(finished.folder)["zero_shot_top1"])


@pytest.mark.parametrize("name", ["tiny", "tiny-dense"])
def test_a_run_that_has_just_begun(tmp_path, finished, name):
    nasty = "key</script><script>alert(1)</script>: \ud800 broken".encode(errors="replace").decode()
    with Workdir.open(tmp_path / "a <b>", config(name=name)) as workdir:
        empty = Page(write_report(workdir.path, None, say=print).read_text())
        assert "No step is logged yet." in empty.text and "holds no checkpoint yet; train first" in empty.text
        bad = {"bad_examples": 1, "bad_first": [nasty]} | ({} if name == "tiny" else {"wanted": None, "kept": None})
        lines = [json.dumps({**line, **bad}) for line in metrics(finished.folder)[:3]]
        workdir.metrics.write_text("\n".join(lines) + "\n")
        html = write_report(workdir.path, None, say=print).read_text()
    page = Page(html)
    assert f"a <b>: {name}, step 3 of {STEPS}" in page.text and nasty in page.text
    assert page.elements["script"] == 2 and len(charts_of(html)) == page.classes["chart"]
    assert ("the model is dense" in page.text) == (name == "tiny-dense")


def test_curves_are_means_of_parts_and_snapshots_are_few():
    steps = 1000
    rng = np.random.default_rng(0)
    total, rate = rng.random(steps), rng.random((steps, 1, 2))
    total[10] = np.nan
    lines = [
        {
            "step": n + 1,
            "total": None if np.isnan(total[n]) else total[n],
            "success_rate": rate[n].tolist(),
            "wanted": rng.integers(0, 9, (1, 2, 4)).tolist() if n % 7 == 0 else None,
            "step_seconds": 0.5,
            "bad_examples": 2,
            "bad_first": ["a: b", "c: d"],
        }
        for n in range(steps)
    ]
    found = read_curves(config(f"train.steps={steps}"), iter(lines))
    part = np.arange(steps) * POINTS // steps
    for number in range(POINTS):
        assert found.step[number] == pytest.approx(1 + np.flatnonzero(part == number).mean())
        assert found.scalars["total"][number] == pytest.approx(np.nanmean(total[part == number]))
        np.testing.assert_allclose(found.by_layer["success_rate"][number], rate[part == number].mean(axis=0))
    assert found.snapshots[0].step == 1 and found.snapshots[-1].step == 995 and len(found.snapshots) == SNAPSHOTS + 1
    assert (found.last_step, found.seconds, found.num_bad, len(found.first_bad)) == (steps, 500, 2000, 5)


def opened(page, folder):
    """The elements of a page after its scripts ran, and what Chromium wrote to its console."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'browser'}"]
    words = [BROWSER, *flags, "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# Points at the middle of each chart, as a person would.
HOVER = """<script>document.querySelectorAll("figure.chart svg").forEach((svg) => {
  const box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 5}));
});</script>"""


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here; .ci/run installs it where it may and says if it could not"
)
def test_in_a_browser_it_has_no_error_and_shows_values_under_the_pointer(html, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(html.replace("</body>", f"{HOVER}</body>"))
    elements, console = opened(page, tmp_path)
    assert not console
    tips = re.findall(r'<div class="tip"[^>]*>(step \d+(?:<br>[^<]+)+)</div>', elements)
    charts = charts_of(html)
    assert len(tips) == len(charts)
    for tip, chart in zip(tips, charts, strict=True):
        assert [line.rsplit(" ", 1)[0] for line in tip.split("<br>")[1:]] == [one["name"] for one in chart["series"]]
    page.write_text(
        html.replace("</body>", '<script>nothing.there</script><img src="https://example.org/a.png"></body>')
    )
    _, console = opened(page, tmp_path)
    assert any("nothing is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)


def test_the_command(finished, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert cli.main(["report", f"--workdir={tmp_path}"]) == 1
    assert "it has no config.json" in capsys.readouterr().err and not out.exists()
