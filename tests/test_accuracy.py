"""Whole runs of `edgeguard bench accuracy` on a scripted guard: measures, going on, thresholds from elsewhere, the page, GuardBench."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from fakes import MODEL
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard import profiles
from edgeguard.bench import accuracy_page, quality_run
from edgeguard.bench.accuracy_result import read_accuracy
from edgeguard.bench.guardbench import moderate, probability
from edgeguard.calibration import Calibration
from edgeguard.cli import main
from edgeguard.conversation import Message
from edgeguard.errors import InferenceError, InputError
from edgeguard.guard import Guard
from edgeguard.policy import Policy
from edgeguard.verdict import Category, Verdict

LABELS = {category.code: category for category in profiles.get("llama-guard-2").policy.categories}


class Scorer:
    """A guard whose verdict stands in the last message: `0.9 S1,S9 words`; it dies of the word `crash`."""

    def __init__(self) -> None:
        self.identity, self.calibration, self.asked = MODEL, Calibration(), 0
        self.policy: Policy = profiles.get("llama-guard-2").policy

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def check_many(self, items: Iterable[Sequence[Any]], role: str | None = None, threshold: float | None = None,
                   *, verdict_only: bool = False) -> Iterator[Verdict]:
        limit = self.calibration.threshold if threshold is None else threshold
        for item in items:
            last = item[-1]
            text = last.content if isinstance(last, Message) else last["content"]
            if "crash" in text:
                raise InferenceError("crashed")
            self.asked += 1
            score, codes = text.split(" ")[:2]
            yield self.verdict(float(score), [] if codes == "-" or verdict_only else codes.split(","), limit, role or "user")

    def verdict(self, raw: float, codes: list[str], threshold: float, role: Any) -> Verdict:
        score = self.calibration(raw)
        unsafe = score >= threshold
        listed = tuple(Category(code, LABELS[code].slug, LABELS[code].name, 0.9, listed=True) for code in codes if unsafe)
        return Verdict(
            verdict="unsafe" if unsafe else "safe", score=score, raw_score=raw, threshold=threshold, mass=1.0, role=role, categories=listed,
            unexplored=0.0, raw="", tokens={}, passes=1, windows=1, cache_hit=True, timings={}, model=self.identity,
        )


def row(text: str, *codes: str, unsafe: bool = False, source: str = "kitchen", reply: str | None = None) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}, *([{"role": "assistant", "content": reply}] if reply else [])]
    return {"messages": messages, "role": messages[-1]["role"], "label": "unsafe" if unsafe or codes else "safe", "categories": list(codes),
            "categories_known": not unsafe, "source": source}


ROWS = [
    row("0.9 S9 invented hate", "S9"), row("0.8 S1,S9 invented blow", "S1", "S2"), row("0.7 S2 a harmless bomb <b>bath</b>"),
    row("0.45 S6 mild", "S10", source="street"), row("0.1 - hello"), row("0.2 - a question", reply="0.6 - an invented reply"),
    row("0.3 - no class", unsafe=True, source="street"), row("0.05 - bye", reply="0.02 - good bye"),
]  # fmt: skip


def write(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), "utf-8")
    return path


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scorer:
    made = Scorer()
    monkeypatch.setattr(Guard, "load", lambda *_, **__: made)
    monkeypatch.chdir(tmp_path)
    return made


def run(*arguments: str) -> int:
    return main(["bench", "accuracy", *arguments])


def result(folder: str = "out") -> dict[str, Any]:
    return read_accuracy(Path(folder, "result.json"))


# measures


def test_measures_at_the_default_and_at_a_given_threshold(scorer: Scorer, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("rows.jsonl"))
    assert run("rows.jsonl", "--threshold", "0.4", "--out", "out") == 0
    found = result()
    assert [found["overall"][key] for key in ("tp", "fp", "fn", "tn")] == [2, 2, 2, 2]
    assert [found["chosen"]["overall"][key] for key in ("tp", "fp", "fn", "tn")] == [3, 2, 1, 2]
    assert (found["threshold"], found["chosen"]["threshold"], found["chosen"]["from"]) == (0.5, 0.4, "given")
    assert found["by_role"]["assistant"]["fpr"] == 0.5 and found["by_source"]["street"]["recall"] == 0
    assert found["overall"]["recall_95"][0] < 0.5 < found["overall"]["recall_95"][1] and found["overall"]["auprc_95"]
    # three rows have a known class, two are found at 0.5 and have a right first code; of their codes S9, S1, S2 and said S9, S1, S9
    codes = found["overall"]["codes"]
    assert [codes[key] for key in ("rows", "found", "right", "accuracy")] == [3, 2, 2, 1.0]
    assert all(codes[f"{name}_95"][0] <= codes[name] <= codes[f"{name}_95"][1] for name in ("micro_f1", "micro_f1_found"))
    assert codes["micro_f1_found"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1)) and codes["micro_f1"] == pytest.approx(4 / (4 + 1 + 2))
    assert found["chosen"]["overall"]["codes"]["right"] == 2 and found["chosen"]["overall"]["codes"]["found"] == 3
    shown = capsys.readouterr().out
    assert "at 0.4, all" in shown and "role assistant" in shown and "Written to" in shown


def figures(categories: dict[str, dict[str, Any]]) -> dict[str, tuple[int, int, int]]:
    return {code: (each["rows"], each["found"], each["right"]) for code, each in categories.items()}


def test_categories_confusion_and_the_worst_errors(scorer: Scorer) -> None:
    write(Path("rows.jsonl"))
    assert run("rows.jsonl", "--out", "out") == 0
    found = result()
    assert figures(found["categories"]["overall"]) == {"S1": (1, 1, 1), "S2": (1, 1, 1), "S9": (1, 1, 1), "S10": (1, 0, 0)}
    assert found["confusion"]["overall"] == {
        "violent-crimes": {"violent-crimes": 1}, "non-violent-crimes": {"violent-crimes": 1}, "hate": {"hate": 1}, "self-harm": {"safe": 1},
        "unknown": {"safe": 1}, "safe": {"non-violent-crimes": 1, "safe": 2, "no code": 1}}
    lines = {kind: [each["line"] for each in held] for kind, held in found["worst"].items()}
    assert lines == {"false_alarms": [3, 6], "misses": [7, 4]}
    assert found["best_f1"]["f1"] == pytest.approx(0.8) and found["best_f1"]["chosen_on"] == "the rows it is told for"
    assert all("invented" not in path.read_text("utf-8") and "bath" not in path.read_text("utf-8") for path in Path("out").iterdir())


def test_categories_are_told_by_role_and_at_each_threshold(scorer: Scorer) -> None:
    write(Path("rows.jsonl"), [row("0.9 S2 invented", "S2"), row("0.1 - hello"), row("0.2 - hm", "S2", reply="0.45 S1 an invented reply"),
                               row("0.2 - hm", "S9", reply="0.8 S9 another")])
    assert run("rows.jsonl", "--threshold", "0.4", "--out", "out") == 0 and report() == 0
    found = result()
    at = {name: {role: (figures(held["categories"]["by_role"][role]), held["confusion"]["by_role"][role]) for role in ("user", "assistant")}
          for name, held in (("default", found), ("chosen", found["chosen"]))}
    user = ({"S2": (1, 1, 1)}, {"non-violent-crimes": {"non-violent-crimes": 1}, "safe": {"safe": 1}})
    assert at["default"] == {"user": user, "assistant": (
        {"S2": (1, 0, 0), "S9": (1, 1, 1)}, {"non-violent-crimes": {"safe": 1}, "hate": {"hate": 1}})}
    assert at["chosen"] == {"user": user, "assistant": (
        {"S2": (1, 1, 0), "S9": (1, 1, 1)}, {"non-violent-crimes": {"violent-crimes": 1}, "hate": {"hate": 1}})}
    assert [figures(held["categories"]["overall"])["S2"] for held in (found, found["chosen"])] == [(2, 1, 1), (2, 2, 1)]
    page = Path("out", "report.html").read_text("utf-8")
    told = [f"{threshold}: {rows}" for threshold in ("At the default threshold 0.5", "At 0.4, chosen elsewhere")
            for rows in ("all rows", "assistant", "user")]
    for title in ("Recall by category", "First codes by category"):
        assert re.findall(rf"<caption>{title}\. (.*?)</caption>", page) == told


def test_one_role_alone_has_no_table_of_its_own(scorer: Scorer) -> None:
    write(Path("rows.jsonl"), [row("0.9 S2 invented", "S2"), row("0.1 - hello")])
    assert run("rows.jsonl", "--out", "out") == 0 and report() == 0
    page = Path("out", "report.html").read_text("utf-8")
    captions = re.findall(r"<caption>(?:Recall|First codes) by category\. (.*?)</caption>", page)
    assert captions == ["At the default threshold 0.5: all rows"] * 2


def test_calibrated_and_raw_scores_both_have_an_error(scorer: Scorer) -> None:
    scorer.calibration = Calibration(2.0, -1.0, 0.3, "cd" * 32, 100)
    write(Path("rows.jsonl"))
    assert run("rows.jsonl", "--out", "out") == 0
    found = result()
    assert (found["threshold"], found["calibration"]["slope"], found["calibration"]["rows"]) == (0.3, 2.0, 100)
    assert found["overall"]["ece"] != found["overall"]["ece_raw"] == pytest.approx(0.37125)
    assert found["overall"]["ece_95"] != found["overall"]["ece_raw_95"] and found["overall"]["ece_raw_95"][0] < 0.37
    assert report() == 0
    shown = Path("out", "report.html").read_text("utf-8")
    for value, bounds in ((found["overall"][name], found["overall"][f"{name}_95"]) for name in ("ece", "ece_raw")):
        assert f"{value:.3f} ({bounds[0]:.2f}-{bounds[1]:.2f})" in shown
    bins = found["reliability"]["overall"]
    assert sum(each["rows"] for each in bins["raw_score"]) == 8 and bins["score"] != bins["raw_score"]


# going on


def test_a_run_that_was_ended_goes_on(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_run, "CHUNK", 3)
    write(Path("rows.jsonl"))
    assert run("rows.jsonl", "--limit", "5", "--out", "out") == 0
    assert scorer.asked == 5
    with Path("out", "verdicts.jsonl").open("a") as file:
        file.write('{"line": 1, "sco')  # as a kill leaves it
    assert run("rows.jsonl", "--out", "out") == 0
    assert scorer.asked == 8, "no row is judged twice"
    assert run("rows.jsonl", "--out", "whole") == 0
    for key in ("overall", "confusion", "worst"):
        assert result()[key] == result("whole")[key]
    lines = [json.loads(line) for line in Path("out", "verdicts.jsonl").read_text().splitlines()]
    assert sorted(each["line"] for each in lines) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(each.keys() == {"line", "score", "raw_score", "codes"} for each in lines)


def test_an_error_keeps_the_chunks_before_it(scorer: Scorer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(quality_run, "CHUNK", 2)
    rows = [row(f"0.1 - {'long ' * 9}words {place}") for place in range(4)]
    write(Path("rows.jsonl"), [*rows, row("crash")])
    assert run("rows.jsonl", "--out", "out") == 2
    assert "line 5" in capsys.readouterr().err and scorer.asked == 4
    assert len(Path("out", "verdicts.jsonl").read_text().splitlines()) == 4 and not Path("out", "result.json").exists()


def test_a_folder_takes_no_other_run(scorer: Scorer, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("rows.jsonl"))
    write(Path("others.jsonl"), ROWS[:3])
    assert run("rows.jsonl", "--out", "out") == 0

    def refused(*arguments: str) -> str:
        assert run(*arguments, "--out", "out") == 2
        told: str = capsys.readouterr().err
        return told

    assert "holds another run (data differ)" in refused("others.jsonl")
    assert "(threshold differ)" in refused("rows.jsonl", "--threshold", "0.2")
    scorer.identity = replace(scorer.identity, sha256="ef" * 32)
    assert "(model differ)" in refused("rows.jsonl")
    scorer.identity, scorer.calibration = MODEL, Calibration(1.5, 0.0, 0.5, "cd" * 32, 100)
    assert "(calibration differ)" in refused("rows.jsonl")
    scorer.calibration = Calibration()
    with Path("out", "verdicts.jsonl").open("a") as file:
        file.write('{"line": 1, "score": 7, "raw_score": 0, "codes": []}\n')
    assert "damaged" in refused("rows.jsonl")
    Path("other").mkdir()
    Path("other", "letter.txt").touch()
    assert run("rows.jsonl", "--out", "other") == 2 and "holds other files" in capsys.readouterr().err


def test_a_model_without_a_hash_cannot_go_on(scorer: Scorer, capsys: pytest.CaptureFixture[str]) -> None:
    scorer.identity = replace(scorer.identity, sha256="")
    write(Path("rows.jsonl"))
    assert run("rows.jsonl", "--out", "out") == 0
    assert run("rows.jsonl", "--out", "out") == 2 and "without a hash" in capsys.readouterr().err


# a threshold from elsewhere


def test_a_threshold_comes_from_other_rows_of_the_same_model(scorer: Scorer, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("rows.jsonl"))
    write(Path("val.jsonl"), [row("0.8 S1 invented", "S1"), row("0.6 - x"), row("0.2 - y")])
    assert run("val.jsonl", "--out", "val") == 0 and result("val")["best_f1"]["threshold"] == pytest.approx(0.7)
    assert run("rows.jsonl", "--threshold-from", "val/result.json", "--out", "out") == 0
    chosen = result()["chosen"]
    assert chosen["threshold"] == pytest.approx(0.7) and chosen["from"]["name"] == "val.jsonl" and chosen["from"]["rows"] == 3
    assert [chosen["overall"][key] for key in ("tp", "fp")] == [2, 1]
    assert run("val.jsonl", "--threshold-from", "val/result.json") == 2 and "same file" in capsys.readouterr().err
    scorer.identity = replace(scorer.identity, sha256="ef" * 32)
    assert run("rows.jsonl", "--threshold-from", "val/result.json") == 2 and "of another model" in capsys.readouterr().err
    Path("speed.json").write_text('{"bench": "speed"}')
    assert run("rows.jsonl", "--threshold-from", "speed.json") == 2 and "but of 'speed'" in capsys.readouterr().err


def test_without_an_unsafe_row_there_is_no_threshold(scorer: Scorer, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("rows.jsonl"))
    write(Path("safe.jsonl"), [row("0.1 - x")])
    assert run("safe.jsonl", "--out", "safe") == 0 and result("safe")["best_f1"] is None
    assert run("rows.jsonl", "--threshold-from", "safe/result.json") == 2 and "no unsafe row" in capsys.readouterr().err


# the page


def report(*arguments: str) -> int:
    return main(["bench", "report", "out/result.json", *arguments])


def test_the_page_shows_folded_texts_of_the_worst_errors(scorer: Scorer, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("rows.jsonl"))
    assert run("rows.jsonl", "--threshold", "0.4", "--out", "out") == 0 and report() == 0
    page = Path("out", "report.html").read_text("utf-8")
    assert "0.7 S2 a harmless bomb &lt;b&gt;bath&lt;/b&gt;" in page and "<b>bath" not in page
    assert page.count("<details>") == 4 and "<details open" not in page and "This page holds texts" in page
    assert "invented hate" not in page, "texts of right verdicts are not shown"
    codes = result()["overall"]["codes"]
    assert f"{codes['micro_f1']:.3f} ({codes['micro_f1_95'][0]:.2f}-{codes['micro_f1_95'][1]:.2f}); of rows found" in page
    for told in ("At the default threshold 0.5", "At 0.4, chosen elsewhere", "Recall by category", "S10 self-harm", "<svg",
                 "reliability-all", "Best F1 on these very rows"):
        assert told in page, told
    assert not re.search(r"https?:|@import|url\(|<script", page)
    assert "Beside published figures" not in page


def test_without_its_file_the_page_says_so(scorer: Scorer, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(Path("rows.jsonl"))
    assert run("rows.jsonl", "--out", "out") == 0
    moved = path.rename("moved.jsonl")
    assert report() == 0 and "rows.jsonl is not at hand" in Path("out", "report.html").read_text("utf-8")
    assert report("--data", "moved.jsonl") == 0 and "harmless bomb" in Path("out", "report.html").read_text("utf-8")
    write(Path("rows.jsonl"), ROWS[1:])
    assert report() == 0
    page = Path("out", "report.html").read_text("utf-8")
    assert "not the file that was judged" in page and "harmless bomb" not in page
    assert report("--data", "rows.jsonl") == 2 and "not the file that was judged" in capsys.readouterr().err
    assert moved.exists() and report("--data", "none.jsonl") == 2


def test_published_figures_stand_beside_their_set(scorer: Scorer) -> None:
    with Path("x.csv").open("w", newline="") as file:
        rows = [["0.9 S1 a", "contrast_discr"], ["0.8 S1 b", "privacy_public"], ["0.1 - c", "homonyms"]]
        csv.writer(file).writerows([["prompt", "type"], *rows])
    assert run("x.csv", "--set", "xstest", "--limit", "2", "--out", "out") == 0 and report() == 0
    page = Path("out", "report.html").read_text("utf-8")
    assert "Llama Guard 2" in page and "0.884" in page and "0.084" in page and "a part of the set" in page
    assert "Types that begin with contrast_ are unsafe." in page and "none was measured here" in page


def test_a_result_that_is_not_whole_is_refused(scorer: Scorer, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("rows.jsonl"))
    assert run("rows.jsonl", "--out", "out") == 0
    for key in ("overall", "worst", "reliability", "categories", "confusion"):
        with pytest.raises(InputError, match="no whole result"):
            accuracy_page.page({name: value for name, value in result().items() if name != key}, Path("out/result.json"))
    Path("out", "result.json").write_text('{"bench": "accuracy", "format": 1}')
    assert report() == 2 and "another version" in capsys.readouterr().err


# GuardBench


def test_guardbench_gets_a_number_for_each_conversation() -> None:
    def turns(*texts: str, first: int = 0) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[(place + first) % 2], "content": text} for place, text in enumerate(texts)]

    guard: Any = Scorer()
    items = [turns("0.9 S1 a"), turns("0.1 - b", "0.6 - c"), turns("0.9 - greeting", "0.2 - d", first=1), turns("0.4 - e")]
    assert moderate(items, guard) == [pytest.approx(0.9), pytest.approx(0.6), pytest.approx(0.2), pytest.approx(0.4)]
    assert [number > 0.5 for number in moderate(items, guard, threshold=0.4)] == [True, True, False, True]


def test_guardbench_is_told_which_conversation_cannot_be_judged() -> None:
    with pytest.raises(InputError, match=r"Conversation 2 of the batch"):
        moderate([[{"role": "user", "content": "Hello."}], [{"role": "user", "content": " "}]], Guard.scripted(lambda _: "safe"))


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_stretched_score_keeps_the_verdict_and_the_order(one: float, other: float, threshold: float) -> None:
    assert (probability(one, threshold) > 0.5) == (one >= threshold)
    assert 0 <= probability(one, threshold) <= 1
    if one <= other:
        assert probability(one, threshold) <= probability(other, threshold)
