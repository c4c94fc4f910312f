"""The HTML report, opened in a real browser where one is installed: every plot there, nothing loaded, no error."""

import re

import pytest
from helpers.headless import browser, open_page

from ds_quant.config import ConfigError
from ds_quant.diagnostics import folder, html
from ds_quant.diagnostics.measurement import Measurement

needs_browser = pytest.mark.skipif(browser() is None, reason="no chromium is installed (chromium-headless-shell)")

IMAGES = "Array.from(document.images).map(i => [i.complete, i.naturalWidth, i.naturalHeight, i.alt])"
OPEN = "document.querySelectorAll('details').forEach(d => { d.open = true })"
SHOWN = "Array.from(document.querySelectorAll('table')).map(t => t.offsetHeight)"
ANCHORS = (
    "Array.from(document.querySelectorAll('nav a')).map(a => document.querySelector(a.getAttribute('href')) !== null)"
)
WIDER = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


def outliers(step, name="model.layers.0.mlp.down_proj", **more):
    row = {"layer": name, "channels": 64, "outliers": 1, "indices": "7", "mean": 0.5, "largest": 9.0}
    row |= {"largest_over_mean": 18.0, "threshold": 4.0, **more}
    scalars = {"outlier_channels": 1.0, "outlier_share": 1 / 64, "layers_with_outliers": 1.0, "largest_over_mean": 18.0}
    return Measurement("outliers", step, scalars, [row], {"num_std": 6.0, "tokens": 512})


def norms(*values):
    rows = [{"step": n, "norm": v, "over_median": None, "spike": 0} for n, v in enumerate(values, 1)]
    scalars = {"spikes": 0.0, "largest_norm": max(values)}
    return Measurement("gradient_norms", len(values), scalars, rows, {"factor": 3.0, "window": 50, "spikes_at": []})


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of two kinds in three folders, and the file."""
    place = tmp_path_factory.mktemp("report")
    (place / "a").mkdir()
    folder.begin(place / "a", 0, resumed=False)
    folder.add_look(place / "a", 100, [outliers(100), norms(*[1.0 + 0.01 * n for n in range(100)])])
    folder.add_look(place / "a", 200, [outliers(200)])
    html.write_report([place / "a"], place / "report.html", "A <b>title</b> & more")
    return place / "report.html"


def test_it_is_one_file_that_names_nothing_elsewhere(report):
    text = report.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert "http" not in re.sub(r"http-equiv|base64,[A-Za-z0-9+/=]+", "", text)
    assert "<script" not in text
    assert "A &lt;b&gt;title&lt;/b&gt; &amp; more" in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_every_plot_and_has_nothing_to_complain_about(report, dark):
    page = open_page(report, IMAGES, OPEN, SHOWN, ANCHORS, WIDER, BACKGROUND, dark=dark)
    images, _, tables, anchors, wider, background = page.values
    assert len(images) == 2
    for complete, width, height, text in images:
        assert complete
        assert width > 300
        assert height > 100
        assert len(text) > 30
    assert all(height > 0 for height in tables)
    assert len(tables) == 4  # figures and rows of each kind
    assert anchors == [True, True]
    assert not wider, "the page scrolls sideways"
    assert page.console == []
    assert page.requests[0] == report.resolve().as_uri()
    assert {url.partition(":")[0] for url in page.requests[1:]} == {"data"}
    red = int(re.search(r"rgb\((\d+)", background)[1])
    assert (red < 64) == dark
    assert page.screenshot.startswith(b"\x89PNG")


@needs_browser
def test_the_browser_test_sees_what_is_wrong(report, tmp_path):
    """The control: a picture that is broken, a request and an error are noticed."""
    text = report.read_text()
    broken = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    broken = re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "data:image/svg+xml;base64,AAAA", broken, count=1)
    broken = broken.replace("</body>", '<img src="https://example.org/x.png"><script>undefined_name()</script></body>')
    path = tmp_path / "broken.html"
    path.write_text(broken)
    page = open_page(path, IMAGES)
    assert page.values[0][0][1:3] == [0, 0]
    assert "https://example.org/x.png" in page.requests
    assert any("undefined_name" in entry for entry in page.console)


@needs_browser
def test_the_policy_inside_the_file_forbids_requests_and_scripts(report, tmp_path):
    path = tmp_path / "scripted.html"
    added = '<img src="https://example.org/x.png"><script>document.title = "ran"</script></body>'
    path.write_text(report.read_text().replace("</body>", added))
    page = open_page(path, "document.title")
    assert page.values == ["A <b>title</b> & more"]
    assert sum("Content Security Policy" in entry for entry in page.console) == 2, page.console


def test_figures_that_are_not_finite_and_names_with_markup_are_shown(tmp_path):
    one = outliers(5, name="<script>x</script>", mean=float("nan"), largest=float("inf"), threshold=None)
    text = html.render([one], "t")
    assert "<script>x" not in text
    assert "&lt;script&gt;x" in text
    assert "<td>nan</td>" in text
    assert "<td>inf</td>" in text


def test_a_kind_that_cannot_be_drawn_says_so_and_the_others_are_there():
    text = html.render([Measurement("oscillation", 5, {}, [{"layer": "a"}], {}), outliers(5)], "t")
    assert text.count("could not be drawn") == 1
    assert text.count("<img ") == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, 'got "nothing there"'),
        (lambda path: path.mkdir(), 'got "no measurement"'),
        (lambda path: path.write_text("{"), "a whole file of measurements"),
    ],
)
def test_nothing_to_report_is_one_clear_error(tmp_path, make, said):
    make(tmp_path / "x")
    with pytest.raises(ConfigError, match=re.escape(said)):
        html.write_report([tmp_path / "x"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_plot_with_very_many_points_becomes_a_png(monkeypatch):
    monkeypatch.setattr(html, "MOST_BYTES", 1000)
    text = html.render([outliers(5)], "t")
    assert text.count('src="data:image/png;base64,') == 1
    assert "image/svg" not in text
