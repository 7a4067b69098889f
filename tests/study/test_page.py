"""The report's page in a browser: hovering, the legend, sorting, pairs, and nothing from the network."""

import html
import json
import math
import re
import shutil
import subprocess

import pytest
import torch

import lie_metric as lm
from lie_metric.compare import holm
from lie_metric.study import write_report
from lie_metric.study.store import COLUMNS, Lines, Table, read_records, record_settings

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or chrome on the path: apt-get install chromium, to test the page"
)

LONG = 0.9999  # a bar that ends far below the frame, on a logarithmic axis
GENERATORS = ("translation_x", "translation_y", "rotation")

# Runs in the page, after its own script: what a reader does, and what is seen then.
SCRIPT = """
const seen = {}, all = s => [...document.querySelectorAll(s)];
const dots = () => all("#scatter circle").map(c => c.dataset.model);
const pick = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); };
const cells = id => all("#" + id + " tbody tr").map(r => [...r.children].map(c => c.textContent));
try {
  seen.dots = dots();
  seen.undrawn = $("undrawn").textContent;
  const dot = document.querySelector("#scatter circle"), box = dot.getBoundingClientRect();
  seen.hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2) == dot;
  dot.dispatchEvent(new MouseEvent("mousemove", { clientX: 300, clientY: 300 }));
  seen.tip = [$("tip").hidden, $("tip").textContent, getComputedStyle($("tip")).display];
  dot.dispatchEvent(new MouseEvent("mouseleave")); seen.left = $("tip").hidden;
  const svg = $("scatter").getBoundingClientRect(), bottom = svg.y + 450 * svg.width / 860;
  // A point of a bar that is drawn, seen at the frame's foot: inside there is a line, beyond there is none.
  const line = all("#scatter g line").find(l => l.x1.baseVal.value == l.x2.baseVal.value && l.y1.baseVal.value > 460);
  seen.longBar = !!line;
  if (line) {
    line.setAttribute("stroke-width", 9);
    const at = y => document.elementsFromPoint(svg.x + line.x1.baseVal.value * svg.width / 860, y).includes(line);
    seen.inside = at(bottom - 3); seen.beyond = at(bottom + 6);
  }
  all("#legend button")[0].dispatchEvent(new MouseEvent("click", { detail: 1 })); seen.hidden = dots();
  all("#legend button")[0].dispatchEvent(new MouseEvent("click", { detail: 1 })); seen.again = dots();
  const sort = n => all("#models th").find(h => h.textContent == n).click();
  sort("parameters"); seen.up = cells("models").map(r => r[0]);
  sort("parameters"); seen.down = cells("models").map(r => r[0]);
  seen.sorted = all("#models th").find(h => h.textContent == "parameters").getAttribute("aria-sort");
  seen.pairs = cells("pairs"); seen.pairsTitle = $("pairsTitle").textContent;
  pick("generator", "rotation"); seen.turned = cells("pairs");
  pick("generator", "mean per half side"); seen.means = cells("pairs");
  pick("against", "m2"); seen.against = cells("pairs").map(r => r[0]);
  pick("x", "parameters"); seen.size = dots(); seen.sizeUndrawn = $("undrawn").textContent;
} catch (error) { seen.error = "" + error + error.stack; }
addEventListener("load", () => setTimeout(() => {
  seen.asked = [...asked, ...performance.getEntriesByType("resource").map(e => e.name)];
  const out = document.createElement("pre");
  out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
}, 100));
"""


# Refuses all that does not stand in the page, and keeps what was asked for.
POLICY = """<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<script>const asked = []; addEventListener("securitypolicyviolation", e => asked.push(e.blockedURI));</script>"""


def visit(page, folder):
    """What the script saw."""
    page = page.replace("<title>", f"{POLICY}<title>")
    return browse(page.replace("</html>", f"<script>{SCRIPT}</script></html>"), folder)


def browse(page, folder):
    """What a page left in its element "seen"."""
    tested = folder / "tested.html"
    tested.write_text(page)
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,1400", "--no-first-run",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000",
         "--dump-dom", tested.as_uri()],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-1000:]
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Five models over the same images, one of them over larger ones, one without accuracy."""
    folder = tmp_path_factory.mktemp("study")
    record_settings(
        folder, {"data": "digits", "num_images": 8, "eval_images": 8, "resampling": {"interpolation": "bspline"}}
    )
    with Table(folder / "rows-1-of-1.csv", COLUMNS) as table, Lines(folder / "replicates-1-of-1.jsonl") as lines:
        for number in range(5):
            size = 8 if number < 4 else 10
            images = torch.randn(32, 1, size, size, generator=torch.Generator().manual_seed(0))
            metric = lm.LocalEquivarianceError(GENERATORS)
            start, end = ((0, 4), (0, 2), (1, 7), (0, 8), (0, 4))[number]
            line = torch.linspace(-1, 1, size).square()
            weight = torch.zeros(size, size)
            weight[:, start:end] = 1
            if number == 3:  # round: it hardly responds to rotations
                weight = (-4 * (line + line[:, None])).exp()
            metric.update(lambda x, weight=weight: (x * weight).mean((2, 3)), images)
            values, errors = (
                {name: value.item() for name, value in found.items()}
                for found in (metric.relative(), metric.standard_error("relative"))
            )
            lines.append({"model": f"m{number}", "records": [metric.record().to_json()]})
            table.append(
                dict.fromkeys(COLUMNS)
                | {"model": f"m{number}", "generator": name, "status": "ok", "family": "ab"[number % 2], "tag": "t"}
                | {"accuracy": None if number == 3 else 0.5 + number / 10, "parameters": 10 ** (5 - number)}
                | {"relative": values[name], "relative_se": errors[name] if number else LONG * values[name]}
                for name in GENERATORS
            )  # fmt: skip
    write_report(folder, pictures=False)
    return folder


@pytest.fixture(scope="module")
def seen(study):
    return visit((study / "report.html").read_text(), study)


def test_nothing_fails_and_nothing_is_fetched(seen):
    assert "error" not in seen
    assert seen["asked"] == []


def test_hovering_tells_of_a_model(seen):
    assert seen["hit"]
    hidden, text, display = seen["tip"]
    assert not hidden
    assert display != "none"
    assert text.startswith("m0\na, t\nrelative error: ")
    assert "parameters: 1.00e+5" in text
    assert seen["left"]


def test_legend_hides_a_family(seen):
    assert seen["dots"] == ["m0", "m1", "m2", "m4"] == seen["again"]
    assert seen["hidden"] == ["m1"]


def test_who_is_not_drawn_is_named(seen):
    assert seen["undrawn"].strip() == "Not drawn, no accuracy (1): m3."
    assert seen["size"] == ["m0", "m1", "m2", "m3", "m4"]
    assert seen["sizeUndrawn"] == ""


def test_bars_end_at_the_frame(seen):
    assert seen["longBar"]
    assert seen["inside"]
    assert not seen["beyond"]


def test_tables_sort(seen):
    assert seen["up"] == ["m4", "m3", "m2", "m1", "m0"] == seen["down"][::-1]
    assert seen["sorted"] == "descending"


def test_pairs_are_those_of_compare(seen, study):
    records = {model: found["relative"] for model, found in read_records(study).items()}
    assert seen["pairsTitle"] == "relative error · translation_x, per half side, over that of m0"
    rows = {row[0]: row for row in seen["pairs"]}
    assert set(rows) == {"m1", "m2", "m3", "m4"}
    for model in ("m1", "m2", "m3"):
        wanted = lm.compare(records[model], records["m0"])["translation_x"]
        for cell, value in zip(rows[model][3:6], (wanted.ratio, wanted.low, wanted.high), strict=True):
            assert math.isclose(float(cell), value, rel_tol=2e-3)
    # Verdicts are those of Holm's correction over what can be compared: without it m2 would be less.
    assert lm.compare(records["m2"], records["m0"])["rotation"].p < 0.05
    assert [row[6] for row in seen["turned"] if row[0] in {"m2", "m3"}] == ["undecided", "less"]
    for shown, generator in ((seen["pairs"], "translation_x"), (seen["turned"], "rotation")):
        compared = [lm.compare(records[model], records["m0"])[generator] for model in ("m1", "m2", "m3")]
        verdicts = [
            "undecided" if p > 0.05 else "less" if one.ratio < 1 else "more"
            for one, p in zip(compared, holm([one.p for one in compared]), strict=True)
        ]
        assert [{row[0]: row[6] for row in shown}[model] for model in ("m1", "m2", "m3")] == verdicts
    assert rows["m4"][3:7] == ["–", "–", "–", "not comparable"]
    assert "other size of images, (1, 10, 10) and (1, 8, 8)" in rows["m4"][7]
    # A geometric mean has a row too, and any model can be the one that others are compared with.
    assert seen["means"] != seen["pairs"]
    assert all(float(row[4]) < float(row[3]) < float(row[5]) for row in seen["means"] if row[7] == "")
    assert set(seen["against"]) == {"m0", "m1", "m3", "m4"}


@pytest.mark.parametrize("kind", ["one model", "accuracy alone", "failures alone"])
def test_small_studies_have_a_page(study, tmp_path, kind):
    settings = json.loads((study / "settings.json").read_text())
    record_settings(tmp_path, settings)
    row = dict.fromkeys(COLUMNS) | {"model": "m0", "status": "ok", "family": "a", "tag": "t", "reason": ""}
    if kind == "one model":
        (tmp_path / "replicates-1-of-1.jsonl").write_text(
            (study / "replicates-1-of-1.jsonl").read_text().partition("\n")[0] + "\n"
        )
        row |= {"generator": "rotation", "relative": 1.0, "relative_se": 0.1, "parameters": 10}
    elif kind == "accuracy alone":
        row |= {"generator": "", "accuracy": 0.5, "parameters": 10}
    else:
        row |= {"generator": "", "status": "failed", "reason": "memory"}
    with Table(tmp_path / "rows-1-of-1.csv", COLUMNS) as table:
        table.append([row])
    write_report(tmp_path, pictures=False)
    script = "const seen = {}; addEventListener('error', e => { seen.error = e.message; });"
    text = (tmp_path / "report.html").read_text().replace("<title>", f"<script>{script}</script><title>")
    end = "const o = document.createElement('pre'); o.id = 'seen'; o.textContent = JSON.stringify(seen);"
    found = browse(text.replace("</html>", f"<script>{end} document.body.append(o);</script></html>"), tmp_path)
    assert found == {}


def test_the_check_sees_a_page_that_fetches(study, tmp_path):
    page = (study / "report.html").read_text().replace("<h1>", '<img src="http://example.invalid/a.png"><h1>')
    assert visit(page, tmp_path)["asked"][0] == "http://example.invalid/a.png"
