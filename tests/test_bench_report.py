"""The bench's page, picture and comparison, on results with invented numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import bench_result
import pytest
from bench_result import BEST, PEER, cell, cells

from edgeguard.bench import charts
from edgeguard.bench.charts import Axis, Bar, axis_of, bar_chart
from edgeguard.bench.compare import compare
from edgeguard.bench.headline import headline_picture
from edgeguard.bench.markup import joined, tag
from edgeguard.bench.page import SECTIONS, page
from edgeguard.bench.result import Result, figure, read_result
from edgeguard.bench.sections import exact
from edgeguard.cli import main
from edgeguard.errors import InputError, StoreError

VOID = {"meta", "rect", "line", "path"}
SVG = "{http://www.w3.org/2000/svg}"


class Reader(HTMLParser):
    """Checks nesting as it goes; keeps text by the id of the element around it, and all attributes."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str | None]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.text: dict[str, str] = {}
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        self.count[tag] = self.count.get(tag, 0) + 1
        own = dict(attrs).get("id")
        if own is not None:
            self.ids.append(own)
        if tag not in VOID:
            self.open.append((tag, own))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, own in self.open:
            if own is not None:
                self.text[own] = self.text.get(own, "") + " " + data


def read(markup: str) -> Reader:
    reader = Reader()
    reader.feed(markup)
    reader.close()
    assert not reader.open
    return reader


Load = Callable[[dict[str, Any]], Result]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """A result by way of its file."""
    def through_file(data: dict[str, Any]) -> Result:
        path = tmp_path / "result.json"
        path.write_text(json.dumps(data), "utf-8")
        return read_result(path)

    return through_file


@pytest.fixture
def result(load: Load) -> Result:
    return load(bench_result.result())


# reading


def test_a_result_is_read_whole(result: Result) -> None:
    assert [each.id for each in result.cells] == [each.id for each in cells()]
    assert result.cells[0] == cells()[0]
    assert [target.met for target in result.targets] == [True, False, None]


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    data = bench_result.result()
    change(data)
    return data


@pytest.mark.parametrize(("data", "told"), [
    ([], "not a JSON object"),
    ({"bench": "accuracy"}, "bench 'accuracy'"),
    (broken(lambda data: data.pop("cells")), "has no cells"),
    (broken(lambda data: data.update(format=2)), "format is 2"),
    (broken(lambda data: data.pop("machine")), "'machine' is missing"),
    (broken(lambda data: data["cells"].append(data["cells"][0])), "there twice"),
    (broken(lambda data: data["cells"][0].update(p50=1.0)), "not that of its samples"),
    (broken(lambda data: data["cells"][0].update(measured=False)), "not that of its samples"),
    (broken(lambda data: data["cells"][0].update(samples=["1"])), "samples that are no numbers"),
    (broken(lambda data: data["cells"][0].update(samples=[float("nan")])), "not finite"),
    (broken(lambda data: data["cells"][0].update(facts=[])), "no objects"),
    (broken(lambda data: data["targets"][0].update(met="yes")), "no verdict"),
])
def test_what_is_no_result_is_refused(load: Load, data: Any, told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        load(data)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        read_result(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"bench": "spe', "utf-8")
    with pytest.raises(InputError, match="no result of the bench"):
        read_result(tmp_path / "half.json")


@pytest.mark.parametrize(("value", "unit", "told"), [
    (24.5, "s", "24.5 s"), (0.0107, "s", "10.7 ms"), (0.00025, "s", "250 µs"), (0, "s", "0 s"), (1300, "s", "1,300 s"),
    (4.92e9, "B", "4.92 GB"), (512, "B", "512 B"), (0.995, "share", "99.5%"), (1, "share", "100%"), (20.6, "GB/s", "20.6 GB/s"),
])
def test_figures(value: float, unit: str, told: str) -> None:
    assert figure(value, unit) == told


# markup


def test_text_is_escaped_by_construction() -> None:
    assert tag("p", "a<b & \"c\"", title='"><script>') == '<p title="&quot;&gt;&lt;script&gt;">a&lt;b &amp; &quot;c&quot;</p>'
    assert tag("p", tag("b", "x"), ["<", None, tag("i", "y")]) == "<p><b>x</b>&lt;<i>y</i></p>"
    assert joined("\x00\x1b\ud800") == "\ufffd" * 3, "XML has no form for these"


def test_every_text_of_a_result_is_escaped(load: Load) -> None:
    evil = "<script>alert('x')</script>\"&"

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key if key in known else evil + key: poisoned(each) for key, each in value.items()}
        if isinstance(value, list):
            return [poisoned(each) for each in value]
        return evil + value if isinstance(value, str) and value not in ("speed", "s", "B", "share", "GMAC/s", "GB/s", *groups) else value

    data = bench_result.result()
    groups = {each["group"] for each in data["cells"]}
    known = {*data, *data["cells"][0], *data["targets"][0], *data["machine"], *data["model"], "label", "kind", "sha256", "bytes"}
    poisoned_page = page(load(poisoned(data)))
    reader = read(poisoned_page)
    assert "script" not in reader.count
    assert "&lt;script&gt;" in poisoned_page
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name == "src"]


# the page


def test_the_page_is_well_formed_and_asks_for_nothing(result: Result) -> None:
    text = page(result)
    reader = read(text)
    assert len(reader.ids) == len(set(reader.ids))
    assert not reader.count.keys() & {"script", "link", "img", "iframe", "object", "image", "use"}
    assert not re.search(r"https?:|@import|url\(|//", text)
    targets = [value for name, value in reader.attributes if name == "href"]
    assert targets and all(value and value[0] == "#" and value[1:] in reader.ids for value in targets)
    assert '<html lang="en">' in text and 'name="viewport"' in text


def test_the_page_has_a_dark_and_a_printed_form(result: Result) -> None:
    text = page(result)
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    light, dark = (set(re.findall(r"(--[\w]+):", part)) for part in charts.style().split("@media screen and (prefers-color-scheme: dark)"))
    assert light - {"--c"} == dark - {"--c"}, "a colour that is not turned dark would stay light"


def test_every_number_stands_in_the_row_of_its_cell(result: Result) -> None:
    reader = read(page(result))
    for each in result.cells:
        row = reader.text[f"cell-{each.id}"]
        assert each.id in row and each.contender in row
        if each.measured:
            assert f"{exact(each.p50)} {each.unit}" in row and exact(each.p95) in row
        else:
            assert each.reason and each.reason in row


def test_every_section_is_there_and_leads_to_its_cells(result: Result) -> None:
    text = page(result)
    reader = read(text)
    ids = [section.id for section in SECTIONS if section.id != "gpu"]
    assert [own for own in reader.ids if own in ids] == ids
    for each in result.cells:
        if each.group in ids and each.measured:
            assert figure(each.p50 or 0, each.unit) in reader.text[each.group]
            assert each.id in reader.text[each.group]


def test_a_group_without_cells_has_no_section(load: Load) -> None:
    reader = read(page(load(bench_result.result([each for each in cells() if each.group == "packed"], targets=[]))))
    assert "packed" in reader.ids and not {"ladder", "length", "headline", "targets"} & set(reader.ids)
    assert read(page(load(bench_result.result([], targets=[])))).ids


def test_targets_are_told_in_words(result: Result) -> None:
    told = read(page(result)).text["targets"]
    assert "✓ met" in told and "✗ not met" in told and "? not measured" in told
    assert "10.87" in told and "ladder/L0/gguf-q4_k_m/23/first" in told


def test_random_weights_are_told_first(load: Load) -> None:
    data = bench_result.result()
    assert "RANDOM WEIGHTS" in page(load(data)).split("<h2>")[0]
    data["model"]["random"] = False
    assert "RANDOM WEIGHTS" not in page(load(data))


def test_bytes_and_fidelity_stand_beside_a_speed(result: Result) -> None:
    told = read(page(result)).text["ladder"]
    assert "4.90 GB" in told and "fidelity not measured" in told
    assert "99.5% agree with onnx-fp32 (fidelity/onnx-int8)" in told
    assert "10.87x" in told and "4.27x" in told, "how many times as fast as the usual way"


def test_fallbacks_are_told_loudly(load: Load) -> None:
    fallen = replace(cells()[4], facts={"runtime": "x", "fallbacks": ["cuda was not granted"]})
    told = read(page(load(bench_result.result([fallen], targets=[])))).text["ran"]
    assert "Fallbacks were taken" in told and "cuda was not granted" in told


def test_charts_are_told_and_have_their_table(result: Result) -> None:
    root = ET.fromstring(page(result).split("\n", 1)[1])
    drawn = [each for each in root.iter("svg") if each.get("role") == "img"]
    assert len(drawn) > 8
    for svg in drawn:
        ids = {each.get("id"): each.text for each in svg if each.tag in ("title", "desc")}
        assert set((svg.get("aria-labelledby") or "").split()) == ids.keys() and all(ids.values())
    for facet in root.iter("div"):
        if facet.get("class") == "facet":
            assert len(list(facet.iter("table"))) == 1


# charts


def test_a_linear_axis_begins_at_zero() -> None:
    axis = axis_of([2.0, 10.0])
    assert not axis.log and (axis.at(0), axis.at(5), axis.at(10)) == (0, 50, 100)
    assert axis_of([]).at(0) == axis_of([0.0]).at(0) == 0


def test_a_logarithmic_axis_has_whole_powers_of_ten_and_says_so() -> None:
    axis = axis_of([0.02, 30.0])
    assert axis == Axis(0.01, 100.0, True)
    assert axis.ticks == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert axis.at(1.0) == pytest.approx(50)
    assert not axis_of([0.0, 30.0]).log, "zero has no place on it"


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("one", 10.0, "10.0 s", "a"), Bar("two", 2.5, "2.50 s", "b", ours=True), Bar("three", None, "no room", "c")]
    svg = ET.fromstring(bar_chart("x", "title", "desc", bars, "s"))
    widths = {each.get("class"): each.get("width") for each in svg.iter("rect")}
    assert (widths["theirs"], widths["ours"], widths["missing"]) == ("100.00%", "25.00%", "100%")
    texts = [each.text for each in svg.iter("text")]
    assert texts == ["one", "10.0 s", "two", "2.50 s", "three", "not measured", "no room"]


def test_the_picture_shows_the_usual_way_twice_and_the_best_path(result: Result) -> None:
    svg = ET.fromstring(headline_picture(result))
    assert svg.tag == f"{SVG}svg" and svg.findtext(f"{SVG}title") and svg.findtext(f"{SVG}desc")
    shown = [each.text for each in svg.iter(f"{SVG}text") if "value" in (each.get("class") or "")]
    assert shown == ["26.2 s", "10.3 s", "2.41 s"]
    told = " ".join(each.text or "" for each in svg.iter(f"{SVG}text"))
    assert "10.9 times as long" in told and "Random weights" in told
    assert "prefers-color-scheme: dark" in (svg.findtext(f"{SVG}style") or "")


def test_no_picture_without_both_sides(load: Load) -> None:
    with pytest.raises(InputError, match="first call"):
        headline_picture(load(bench_result.result([each for each in cells() if each.contender == BEST])))


# comparing


def compared(load: Load, one: list[Any], other: list[Any], **changed: Any) -> Any:
    return compare(load(bench_result.result(one)), load(bench_result.result(other, **changed)))


def test_ratios_by_hand(load: Load) -> None:
    one = [cell("a/1", BEST, 2.0), cell("a/2", BEST, 100.0, "GMAC/s"), cell("a/3", BEST, 0.0, "share")]
    other = [cell("a/1", BEST, 3.0), cell("a/2", BEST, 50.0, "GMAC/s"), cell("a/3", BEST, 0.0, "share")]
    found = compared(load, one, other)
    assert [(pair.ratio, pair.worse, pair.word) for pair in found.pairs] == [(1.5, 1.5, "worse"), (0.5, 2.0, "worse"), (1.0, 1.0, "same")]
    assert [pair.one.id for pair in found.above(1.5)] == ["a/2"]
    assert not found.warnings


def test_what_is_within_noise_is_no_difference(load: Load) -> None:
    # quartiles are 0.98 and 1.03 of the median
    found = compared(load, [cell("a/1", BEST, 2.0), cell("a/2", BEST, 2.0)], [cell("a/1", BEST, 2.1), cell("a/2", BEST, 2.11)])
    assert [pair.word for pair in found.pairs] == ["within noise", "worse"]
    assert [pair.one.id for pair in found.above(1.0)] == ["a/2"]


def test_one_sample_says_nothing_of_noise(load: Load) -> None:
    single = replace(cell("a/1", BEST, 2.0), samples=(2.0,))
    found = compared(load, [single], [replace(single, samples=(3.0,))])
    assert found.pairs[0].noise is None and found.pairs[0].word == "worse, one sample"
    assert found.above(1.4), "and is no excuse"


def test_cells_without_a_partner_are_named(load: Load) -> None:
    one = [cell("a/1", BEST, 2.0), cell("a/2", BEST, None, reason="no room"), cell("a/4", BEST, 1.0)]
    found = compared(load, one, [cell("a/2", BEST, 1.0), cell("a/3", PEER, 1.0), cell("a/4", BEST, 1.0, "B")])
    assert found.missing == (("a/1", "in the first result only"), ("a/2", "not measured in the first: no room"),
                             ("a/4", "in s and in B"), ("a/3", "in the second result only"))
    assert not found.pairs


def test_differing_circumstances_are_warned_of(load: Load) -> None:
    data = bench_result.result()
    machine = {**data["machine"], "cpu": "Another", "packages": {"onnxruntime": "9"}}
    artifacts = [{**data["model"]["artifacts"][0], "sha256": "cd" * 32}]
    model = {**data["model"], "random": False, "artifacts": artifacts}
    found = compared(load, cells(), cells(), suite="short", machine=machine, model=model)
    told = "\n".join(found.warnings)
    for part in ("cpu Invented Processor 9000, then Another", "random yes, then no", "weights of int8 differ", "onnxruntime 0.0.2, then 9",
                 "suites differ (speed full, speed short)"):
        assert part in told


def test_another_graph_over_the_same_weights_is_warned_of(load: Load) -> None:
    model = bench_result.result()["model"]
    first, second = (
        load(bench_result.result(model={**model, "artifacts": [{**model["artifacts"][0], "digest": digest}]})) for digest in ("ab", "cd")
    )
    assert compare(first, second).warnings == ("The files of int8 differ.",)


# commands


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(bench_result.result()), "utf-8")
    return path


def test_report_and_picture_are_written(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "report", str(file)]) == 0
    assert main(["bench", "picture", str(file), "--out", str(file.with_name("speed.svg"))]) == 0
    assert capsys.readouterr().out.splitlines() == [str(file.with_name("report.html")), str(file.with_name("speed.svg"))]
    assert file.with_name("report.html").read_text("utf-8") == page(read_result(file))
    assert sorted(each.name for each in file.parent.iterdir()) == ["report.html", "result.json", "speed.svg"]


def test_the_result_itself_is_not_overwritten(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file.read_bytes()
    assert main(["bench", "report", str(file), "--out", str(file)]) == 2
    assert main(["bench", "report", str(file), "--out", str(file.parent / "none" / "x.html")]) == 2
    assert file.read_bytes() == before
    assert "choose another file" in capsys.readouterr().err


def test_compare_ends_with_an_error_only_when_asked_to(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = file.with_name("slower.json")
    made = [replace(each, samples=tuple(2 * sample for sample in each.samples)) if each.group == "peers" else each for each in cells()]
    slower.write_text(json.dumps(bench_result.result(made)), "utf-8")
    assert main(["bench", "compare", str(file), str(slower)]) == 0
    out = capsys.readouterr().out
    assert "2.000" in out and "peers/openvino/23/safe: not measured in the first" in out
    assert main(["bench", "compare", str(file), str(slower), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["id"]: each["ratio"] for each in found["cells"]}["peers/llama/23/safe"] == 2
    assert main(["bench", "compare", str(file), str(slower), "--fail-above", "2.5"]) == 0
    assert main(["bench", "compare", str(file), str(slower), "--fail-above", "1.5"]) == 2
    assert "peers/llama/23/safe is worse by 2.00" in capsys.readouterr().err
