"""The bench suite on scripted workers: what is asked of them, what is kept, what goes on after a kill, and what targets say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeguard import cli as main_cli
from edgeguard.bench import artifacts, assemble, ceilings, contenders, fidelity, lengths, speed_cli, suite, targets, texts, visits
from edgeguard.bench.cells import Cell, Step, Store, merged
from edgeguard.bench.contenders import Contender, Setting
from edgeguard.bench.cost import Power
from edgeguard.bench.driver import WORKERS, Peak, Program, Worker
from edgeguard.bench.estimate import Guess, probe
from edgeguard.bench.lengths import Length, above_weights
from edgeguard.bench.prompts import Prompts, accepted
from edgeguard.bench.result import read_result
from edgeguard.bench.rows import read_rows
from edgeguard.bench.suite import Suite
from edgeguard.bench.targets import TARGETS, Target
from edgeguard.bench.visits import Samples, Stream, judged
from edgeguard.bench.work import fastest_seconds, macs
from edgeguard.conversation import Conversation
from edgeguard.errors import InferenceError, InputError

FAKE = """
import json, sys
sys.path.insert(0, {workers!r})
from protocol import Judged, serve

HARM = ("bomb", "steal", "forge", "blackmail", "poison", "launder", "hatred", "virus", "stalk", "smuggle", "cheat", "fire to")

class Engine:
    def load(self, model, threads, options):
        print("a library prints what it likes")
        {load}
        return dict(runtime="fake 1", device="cpu", precision="int8", threads=threads, kernel="", bytes=1000, fallbacks=[], **{facts})

    def judge(self, request):
        with open({log!r}, "a") as file:
            file.write(json.dumps(request) + "\\n")
        if "sizes" in request:
            return Judged([], extra=dict(rates=[[100.0, 200.0, 300.0]] * len(request["sizes"]), operators=["fake"] * len(request["sizes"])))
        raws = []
        for item in request["items"]:
            text, threshold = str(item["message"]), request.get("threshold")
            unsafe = any(word in text for word in HARM) if threshold is None else threshold == 0
            raws.append("unsafe\\nS1" if unsafe else "safe")
        {judge}
        return Judged(raws, [float(raw != "safe") for raw in raws], seconds=0.5 * len(raws))

serve(Engine())
"""


def fake(path: Path, log: Path, load: str = "pass", judge: str = "pass", facts: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FAKE.format(workers=str(WORKERS), log=str(log), load=load, judge=judge, facts=facts), encoding="utf-8")
    return path


def contender(tmp_path: Path, id_: str = "ladder/L2/onnx-int8", **script: str) -> Contender:
    name = id_.replace("/", "-")
    path = fake(tmp_path / f"{name}.py", tmp_path / f"{name}.log", **script)
    edgeguard = not id_.startswith(("ladder/L0", "peers"))
    program = Program(f"edgeguard {name}" if edgeguard else name, (sys.executable, str(path)), "model", 1)
    return Contender(id_, program, "int8", 1000, edgeguard=edgeguard)


def asked(tmp_path: Path, id_: str = "ladder/L2/onnx-int8") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / f"{id_.replace('/', '-')}.log").read_text().splitlines()]


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> artifacts.Measured:
    found = artifacts.find(None, tmp_path_factory.mktemp("none"), make=False)
    return replace(found, found={label: found.found[label] for label in ("onnx-int8", "gguf-q8_0")})


@pytest.fixture(scope="session")
def prompts(mini: artifacts.Measured) -> Prompts:
    return Prompts(mini)


# messages


@pytest.mark.parametrize("tokens", [23, 128, 500])
@pytest.mark.parametrize("answer", ["safe", "unsafe"])
def test_messages_have_the_wanted_length_and_are_distinct(prompts: Prompts, answer: str, tokens: int) -> None:
    items = prompts.items(answer, tokens, 2, 5)
    assert len({item["message"] for item in items}) == 5
    assert len({len(item["ids"]) for item in items}) == 1
    hello = prompts.judged(Conversation.of("Hello."))
    assert len(items[0]["ids"]) - len(hello["ids"]) == tokens - len(prompts._tokenizer.encode_text("Hello."))
    assert items[0] == prompts.items(answer, tokens, 0, 3)[2], "a later question for more gives the same ones"
    begin = items[0]["ids"][: items[0]["prefix"]]
    assert all(item["ids"][: item["prefix"]] == begin for item in items) and prompts.prefix == len(begin) > 0


def test_a_text_beyond_the_context_is_as_long_as_fits(prompts: Prompts) -> None:
    assert prompts.size(23) == 23
    longest = prompts.size(10**6)
    assert len(prompts.items("safe", 10**6, 0, 1)[0]["ids"]) <= 8192 - 64 and longest > 8000


def test_more_messages_than_there_are() -> None:
    with pytest.raises(InputError, match="9999 were asked for"):
        texts.of_tokens(lambda text: len(text.split()), "harmless", 20, 9999)


@pytest.mark.parametrize(("raw", "safe", "one"), [
    ("safe", True, False), ("safe\n", True, False), ("unsafe\nS1", False, True), ("unsafe\nS1,S2", False, False), ("unsafe", False, False),
    ("unsafe\n", False, False), ("not safe", False, False), ("", False, False),
])  # fmt: skip
def test_what_counts_as_an_answer(raw: str, safe: bool, one: bool) -> None:
    assert (accepted("safe")(raw), accepted("unsafe")(raw)) == (safe, one)


# workers


def test_a_worker_is_loaded_asked_and_ended(tmp_path: Path) -> None:
    with Worker(contender(tmp_path).program, tmp_path / "w.log") as worker:
        assert worker.load()["facts"]["runtime"] == "fake 1"
        reply = worker.judge([{"message": "a bomb"}, {"message": "bread"}], {"safe": [1], "unsafe": [2]})
        assert (reply["raw"], reply["seconds"]) == (["unsafe\nS1", "safe"], 1.0)
        with worker.watched() as peak:
            memory = worker.memory()
        assert 0 < (memory["anonymous"] or 1) <= (memory["resident"] or 0) and peak.resident > 0
        process = worker._process
    assert process.returncode == 0
    assert "prints what it likes" in (tmp_path / "w.log").read_text(), "standard output is the protocol's alone"


@pytest.mark.parametrize(("load", "reason"), [
    ("raise ValueError('no such file')", "ValueError: no such file"),
    ("import os; os.write(2, b'illegal instruction'); os._exit(3)", r"'load' \(status 3\): .*illegal instruction"),
])  # fmt: skip
def test_a_worker_that_fails_says_why(load: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match=reason), Worker(contender(tmp_path, load=load).program, tmp_path / "w.log") as worker:
        worker.load()
    assert worker._process.poll() is not None


def test_a_worker_that_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match="cannot be started"):
        Worker(Program("nobody", (str(tmp_path / "none"),)), tmp_path / "w.log")


# samples


def run_judged(tmp_path: Path, prompts: Prompts, answer: str, kind: str, *, random: bool = False, id_: str = "ladder/L2/onnx-int8",
               **script: str) -> Samples:
    one = contender(tmp_path, id_, **script)
    with Worker(one.program, tmp_path / "w.log") as worker:
        worker.load()
        return judged(worker, one, answer, prompts.items(kind, 23, 0, 8), prompts.answers, wanted=4, random=random)


def test_the_models_own_verdict_is_taken_first(tmp_path: Path, prompts: Prompts) -> None:
    assert run_judged(tmp_path, prompts, "unsafe", "unsafe") == Samples([0.5] * 4, ["unsafe\nS1"] * 4, [False] * 4)
    assert {call["threshold"] for call in asked(tmp_path)} == {None}


def test_a_path_that_the_model_does_not_take_is_walked_by_the_threshold(tmp_path: Path, prompts: Prompts) -> None:
    samples = run_judged(tmp_path, prompts, "unsafe", "safe")
    assert samples.forced == [True] * 4, "the first half was judged safe and did not count"
    assert [call["threshold"] for call in asked(tmp_path)] == [None] * 4 + [0.0] * 4


def test_random_weights_are_always_told_which_path(tmp_path: Path, prompts: Prompts) -> None:
    assert run_judged(tmp_path, prompts, "safe", "unsafe", random=True).forced == [True] * 4
    assert {call["threshold"] for call in asked(tmp_path)} == {1.0}


def test_a_peer_is_never_told_its_verdict(tmp_path: Path, prompts: Prompts) -> None:
    peer = "peers/other"
    assert run_judged(tmp_path, prompts, "unsafe", "safe", id_=peer).seconds == []
    assert {call["threshold"] for call in asked(tmp_path, peer)} == {None}
    noise = run_judged(tmp_path, prompts, "safe", "safe", id_=peer, random=True, judge="raws = ['???'] * len(raws)")
    assert noise.raws == ["???"] * 4 and asked(tmp_path, peer)[-1]["max_tokens"] == 2


# cells, steps, store


def cell(id_: str, *samples: float, unit: str = "s", **more: Any) -> Cell:
    return Cell(id_, id_.partition("/")[0], "edgeguard onnx int8", unit, samples=tuple(samples), **more)


def test_samples_of_all_rounds_come_together() -> None:
    one, two = cell("a", 1, 2, extra={"answers": ["safe"], "forced": 0}), cell("a", 3, extra={"answers": ["unsafe"], "forced": 1})
    (both,) = merged([cell("a", reason="died"), one, cell("a", reason="died"), two])
    assert both.samples == (1, 2, 3) and both.p50 == 2 and both.extra["answers"] == ["safe", "unsafe"]
    assert both.to_dict()["reason"] is None and Cell.from_dict(json.loads(json.dumps(both.to_dict()))) == both
    assert merged([cell("b", reason="died")])[0].to_dict()["measured"] is False


def test_a_step_that_fails_leaves_cells_with_the_reason() -> None:
    def fails() -> list[Cell]:
        raise RuntimeError("libggml.so is not there")

    (failed,) = Step("s", (cell("a"),), 1, fails).run()
    assert (failed.measured, failed.reason) == (False, "unexpected RuntimeError: libggml.so is not there")
    one, other = Step("s", (cell("a"), cell("b")), 1, lambda: [cell("a", 1)]).run()
    assert one.measured and other.reason == "it gave no sample"


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, mini: artifacts.Measured) -> None:
    ran: list[str] = []

    def step(name: str, act: Callable[[], object] = lambda: None) -> Step:
        def measured() -> list[Cell]:
            ran.append(name)
            act()
            return [cell(name, 1)]

        return Step(f"group/{name}", (cell(name),), 1, measured)

    def interrupted() -> None:
        raise KeyboardInterrupt

    def broken() -> None:
        raise ValueError("not today")

    store, guess = Store(tmp_path), Guess(mini.shape, 100.0)
    with pytest.raises(KeyboardInterrupt):
        suite.measure(suite.Plan((step("a"), step("b", broken), step("c", interrupted), step("d")), guess), store)
    assert ran == ["a", "b", "c"]
    again = suite.Plan((step("a"), step("b"), step("c"), step("d")), guess)
    suite.measure(again, store)
    assert ran == ["a", "b", "c", "b", "c", "d"], "what was measured is kept, what failed is tried again"
    assert [found[0].measured for each in again.steps if (found := store.cells(each))] == [True] * 4
    (tmp_path / "cells/group/a.json").write_text('{"cells": [{"id"')
    assert store.cells(again.steps[0]) is None and not list(tmp_path.rglob("*.partial"))


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    Store(tmp_path).begin({"suite": "short", "cpu": "x86"})
    Store(tmp_path).begin({"suite": "short", "cpu": "x86"})
    with pytest.raises(InputError, match="cpu differ"):
        Store(tmp_path).begin({"suite": "short", "cpu": "arm64"})


# a visit


def test_a_visit_is_cold_first_then_steady(tmp_path: Path, prompts: Prompts, mini: artifacts.Measured) -> None:
    stream = Stream(("safe", "unsafe"), 3, random=False)
    absent = replace(contender(tmp_path, "peers/none"), missing="no wheel")
    everyone = [contender(tmp_path, "ladder/L0/gguf-q8_0"), contender(tmp_path), absent]
    planned = visits.steps(everyone, 2, stream, prompts, Guess(mini.shape, 100.0), tmp_path)
    assert [step.id for step in planned] == [
        "ladder/L0/gguf-q8_0/round-0", "ladder/L2/onnx-int8/round-0", "peers/none/round-0",
        "ladder/L2/onnx-int8/round-1", "ladder/L0/gguf-q8_0/round-1",
    ]  # fmt: skip
    found = {each.id: each for each in merged(each for step in planned for each in step.run())}
    assert found["ladder/L2/onnx-int8/23/safe"].samples == found["ladder/L0/gguf-q8_0/23/unsafe"].samples == (0.5,) * 6
    assert len(found["ladder/L2/onnx-int8/23/first"].samples) == 2
    assert found["peers/none/23/safe"].reason == found["memory/peers-none/load"].reason == "no wheel"
    assert found["memory/ladder-L2-onnx-int8/steady"].p50
    messages = [call["items"][0]["message"] for call in asked(tmp_path)]
    assert len(set(messages)) == len(messages), "a prompt that was seen costs nothing"
    assert sorted(messages) == sorted(call["items"][0]["message"] for call in asked(tmp_path, "ladder/L0/gguf-q8_0"))


def test_the_peak_is_counted_above_the_weights(tmp_path: Path) -> None:
    one = replace(contender(tmp_path), bytes=700)
    before: dict[str, int | None] = {"resident": 2000, "anonymous": 800, "peak": 2000}
    # 800 anonymous bytes at load are 300 of keys and values and 500 of weights
    assert above_weights(cell("m"), one, {"kv_at_load": 300}, before, Peak(3000, 1200)).samples == (700,)
    # never more weights than there are on disk
    assert above_weights(cell("m"), one, {}, before, Peak(3000, 1200)).samples == (500,)


def test_weights_that_are_packed_behind_the_first_message_are_weights(tmp_path: Path, prompts: Prompts, mini: artifacts.Measured) -> None:
    packing = "self.packed = getattr(self, 'packed', None) or bytearray(b'x') * (96 << 20)"
    one = replace(contender(tmp_path, judge=packing), bytes=1 << 30)
    longest = Length(lengths.LONGEST, 1, answers=("safe",))
    (step,) = lengths.steps([one], [longest], prompts, Guess(mini.shape, 100.0), tmp_path, random=False)
    peak = next(each for each in step.run() if each.id.endswith("peak-8000"))
    assert peak.extra["weights"] > 96 << 20 and (peak.p50 or 0) < 64 << 20


# what follows from the cells


def test_macs_by_hand(mini: artifacts.Measured) -> None:
    layer = 576 * (2 * 576 + 2 * 192) + 3 * 576 * 1536
    assert sum(macs(mini.shape, 10).values()) == 18 * 10 * layer
    saved = 9 * (2 * 576 * 576 + 3 * 576 * 1536)
    assert sum(macs(mini.shape, 10, 1).values()) == 18 * 10 * layer - saved
    assert fastest_seconds({"a": 3e9, "b": 1e9}, {"a": 3, "b": 2}) == 1.5
    assert fastest_seconds({"a": 3e9, "b": 1e9}, {"a": 3}) is None


def ceiling(runtime: str, rate: float) -> list[Cell]:
    return [cell(f"ceiling/int8/{runtime}/{name}", rate, unit="GMAC/s", params={"kind": "int8", "matrix": name})
            for name in ("q/o", "k/v", "gate/up", "down")]


def test_what_has_kernels_of_our_own_is_measured_without_them_too(mini: artifacts.Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured() -> dict[str, str]:
        return {each.id: each.name for each in contenders.ladder(mini, Setting(2)) if each.id.startswith("ladder/L2/onnx")}

    monkeypatch.setattr(contenders.fused, "fits", lambda _: True)
    monkeypatch.setattr(contenders.fused, "built", lambda: Path("any"))
    assert measured() == {"ladder/L2/onnx-int8": "edgeguard onnx int8",
                          "ladder/L2/onnx-int8-runtime": "edgeguard onnx int8, the runtime's own kernels"}
    monkeypatch.setattr(contenders.fused, "built", lambda: None)
    assert list(measured()) == ["ladder/L2/onnx-int8"]


def test_shares_and_upper_levels(mini: artifacts.Measured) -> None:
    rate = sum(macs(mini.shape, 30, 1).values()) / 1e9
    given = [
        cell("ladder/L2/onnx-int8/23/safe", 2.0, extra={"pass_tokens": 30, "prompt_tokens": 33}),
        cell("ladder/L2/onnx-int4/23/safe", 3.0), cell("ladder/L2/onnx-int8/23/first", 1.0),
        cell("packed/onnx-int8/16", 0.5), cell("packed/onnx-int8/1", 1.0), *ceiling("slow", rate / 2), *ceiling("fast", rate),
    ]  # fmt: skip
    found = {each.id: each for each in assemble.complete(given, mini, Power(100, 0.36))}
    best = found["ladder/L3/onnx/23/safe"]
    assert best.p50 == 2 and best.extra["taken_from"] == "ladder/L2/onnx-int8/23/safe" and best.params["level"] == "L3"
    assert best.extra["share_of_int8_ceiling"] == pytest.approx(0.5) and best.extra["gmacs"] == pytest.approx(rate / 2)
    # 200 joules for 33 tokens
    assert best.extra["usd_per_million_tokens"] == pytest.approx(200 / 33 * 1e6 / 3.6e6 * 0.36)
    assert found["ladder/L4/onnx/23/safe"].p50 == 0.5 and "ladder/L3/llama/23/safe" not in found
    assert found["memory/onnx-int8/disk"].p50 == mini.found["onnx-int8"].size


def rated(wanted: Mapping[str, float | None]) -> list[Cell]:
    """Cells of an 8B run by id."""
    return [cell(id_, *(() if value is None else (value,)), reason="died", facts={"bytes": 1000}, extra={"share_of_int8_ceiling": 0.8})
            for id_, value in wanted.items()]


def test_4_bits_of_the_runtime_are_never_edgeguards_own() -> None:
    """A ratio to MatMulNBits says so only of the runtime's kernel, and a pass is held to the products of its own precision."""
    def genai(cells: list[Cell]) -> Any:
        return next(row["got"] for row in targets.judge(cells, "8B") if "genai" in row["what"])

    best, int4 = cell("ladder/L3/onnx/23/safe", 2.0), cell("ladder/L2/onnx-int4/23/safe", 3.0)
    mine = replace(int4, facts={"kernel": "edgeguard avx2"})
    assert genai([best, int4]) == 1.5 and genai([best, mine]) is None
    assert genai([best, mine, cell("ladder/L2/onnx-int4-runtime/23/safe", 6.0)]) == 3
    shares = {"share_of_int8_ceiling": 0.5, "share_of_int4_ceiling": 0.25}
    for precision, wanted in (("int4", 4), ("int8", 2)):
        given = replace(best, facts={"precision": precision}, extra=shares)
        got = {row["what"]: row["got"] for row in targets.judge([given], "8B")}
        assert got["8B, 77-token pass: measured GEMM ceiling over edgeguard's achieved rate"] == wanted


def test_targets_by_hand() -> None:
    given = rated({
        "ladder/L0/gguf-q4_k_m/23/first": 24, "ladder/L0/gguf-q4_k_m/23/safe": 9, "ladder/L2/gguf-q4_k_m/23/safe": 8,
        "ladder/L3/onnx/23/safe": 2, "ladder/L3/llama/23/safe": 8, "peers/onnxruntime-genai/23/safe": None,
        "length/onnx-int8/23/safe": 2, "length/onnx-int8/23/unsafe": 3.5, "packed/onnx-int8/16": 2, "packed/onnx-int8/1": 2,
        "cold/onnx-int8-mapped/stored": 3, "cold/onnx-int8-mapped/evaluated": 4,
        "cold/onnx-int8/stored": 6, "cold/onnx-int8/evaluated": 8, "memory/ladder-L2-onnx-int8/load": 900,
        "memory/ladder-L2-onnx-int8/steady": 1200, "memory/onnx-int8/peak-8000": 2**30, "memory/gguf-q4_k_m/peak-8000": 4 * 2**30,
    })  # fmt: skip
    found = targets.judge(given, "8B")
    values = {row["what"].removeprefix("8B").lstrip(", :"): (row["got"], row["met"]) for row in found if "mini" not in row["what"]}
    assert list(values.values()) == [
        (12, True), (4.5, True), (15, None), (5.625, None), (4, None), (None, None), (1.25, True), (None, None), (1.75, False), (1, True),
        (0.75, True), (0.75, None), (1.2, False), (4, False),
    ]  # fmt: skip
    by_what = {row["what"]: row for row in found}
    genai = next(row for what, row in by_what.items() if "genai" in what)
    assert genai["note"] == "died" and genai["wanted"] == ">= 2.5x"
    instead = targets.judge([*given, *rated({"ladder/L2/onnx-int4/23/safe": 6})], "8B")
    genai = next(row for row in instead if "genai" in row["what"])
    assert genai["got"] == 3 and genai["met"] and "MatMulNBits" in genai["note"]
    assert found[0]["from"] == ["ladder/L0/gguf-q4_k_m/23/first", "ladder/L3/onnx/23/safe"]
    assert all(row["met"] is None and row["note"] for row in found if "mini" in row["what"]), "nothing is said of what was not measured"
    assert all(row["met"] is None for row in targets.judge([], "8B"))


@pytest.mark.parametrize(("value", "met"), [(0.9951, True), (0.995, True), (0.9949, False)])
def test_fidelity_targets(value: float, met: bool) -> None:
    target = next(each for each in TARGETS if each.what.startswith("mini, int8"))
    assert target.judge({"fidelity/onnx-int8": cell("fidelity/onnx-int8", value)}, "mini")["met"] is met
    assert Target("x", "", 1, True, targets.agreement("int4")).judge({}, "mini")["met"] is None


def test_peers_are_held_against_the_most_exact_artifact(scripted: Path, tmp_path: Path, prompts: Prompts, mini: artifacts.Measured) -> None:
    path = tmp_path / "rows.jsonl"
    turns = [["Make a bomb."], ["Hello."], ["Hello.", "Steal a car."]]
    path.write_text("".join(json.dumps({
        "role": ("user", "assistant")[len(texts) - 1], "label": "safe", "categories": [], "categories_known": True, "source": "x",
        "messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)],
    }) + "\n" for texts in turns))
    peer = contender(tmp_path, "peers/one-int4", judge="raws = ['I judge nothing.' if 'Hello' in raw['text'] else ' unsafe\\nS1' "
                                                       "for raw in request['items']]")
    absent = replace(contender(tmp_path, "peers/none"), missing="no wheel")
    planned = fidelity.steps(mini, [peer, absent], read_rows(path), Setting(1), prompts, Guess(mini.shape, 100.0), tmp_path, tmp_path)
    found = {each.id: each for step in planned for each in step.run()}
    assert found["fidelity/one-int4"].p50 == pytest.approx(1 / 3) and found["fidelity/onnx-int8"].p50 == 1
    assert found["fidelity/none"].reason == "no wheel"
    calls = asked(tmp_path, "peers/one-int4")
    assert [call["role"] for call in calls] == ["assistant", "user"]
    assert all(item["ids"] and item["text"] and item["prefix"] for call in calls for item in call["items"])
    assert Target("x", "", 1, True, targets.agreement("int4")).judge(found, "mini")["met"] is None


def test_guesses_are_corrected_by_what_steps_took(mini: artifacts.Measured, tmp_path: Path) -> None:
    guess = Guess(mini.shape, probe(iter([0.0, 0.1, 0.5]).__next__))
    assert guess.correction == 1
    guess.learn(1000, 3000)
    assert 2.8 < guess.correction < 3
    long, short = (guess.evaluate(contender(tmp_path), tokens) for tokens in (2000, 20))
    assert long > 50 * short


# a whole run


TINY = Suite("short", rounds=1, steady=2, answers=("safe", "unsafe"), packs=(1, 4, 16, 64), turns=1, packed=2, starts=1, rows=3,
             lengths=(Length(23, 2), Length(8000, 1, answers=("safe",))))


def run(*arguments: str) -> int:
    return main_cli.main(["bench", "speed", *arguments])


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on the shipped artifacts of the mini, all workers replaced."""
    workers = tmp_path / "workers"
    for name in ("guard.py", contenders.L0, "gemm.py"):
        load = "assert options.get('runtime') != 'openvino', 'no such runtime'" if name == "gemm.py" else "pass"
        fake(workers / name, tmp_path / "asked.log", load=load)
    for module in (contenders, ceilings):
        monkeypatch.setattr(module, "WORKERS", workers)
    monkeypatch.setattr(artifacts, "MADE", ())
    monkeypatch.setattr(speed_cli, "probe", lambda: 100.0)
    monkeypatch.setitem(suite.SUITES, "short", TINY)
    return tmp_path / "run"


def test_a_whole_run_from_the_command_line(scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"role": "user", "label": "safe", "categories": [], "categories_known": True, "source": "x"}
    rows.write_text("".join(json.dumps({**row, "messages": [{"role": "user", "content": text}]}) + "\n" for text in ("a", "bomb", "c")))
    assert run("--out", str(scripted), "--rows", str(rows), "--threads", "1") == 0
    shown = capsys.readouterr()
    assert "What will be measured" in shown.err and "left" in shown.err
    assert "NOT MET" in shown.out or "not measured" in shown.out
    result = read_result(scripted / "result.json")
    found = {each.id: each for each in result.cells}
    assert found["ladder/L3/onnx/23/safe"].p50 == found["packed/onnx-int8/16"].p50 == 0.5
    assert found["length/gguf-q8_0/8000/safe"].params["tokens"] == 8000 and found["memory/onnx-int8/peak-8000"].p50 is not None
    assert found["cold/onnx-int8/stored"].samples and found["cold/gguf-q8_0/evaluated"].samples
    assert found["cold/onnx-int8-mapped/stored"].samples and "cold/gguf-q8_0-mapped/stored" not in found
    assert found["ceiling/read"].p50 == found["ceiling/int8/torch/down"].p50 == 200
    assert "no such runtime" in (found["ceiling/int8/openvino/down"].reason or "")
    # the packaged mini has no float artifact, so the most exact one is the GGUF of 8 bits
    assert found["fidelity/onnx-int8"].p50 == 1 and found["fidelity/onnx-int8"].params["against"] == "gguf-q8_0"
    assert result.model["random"] is False and {each["label"] for each in result.model["artifacts"]} == {"onnx-int8", "gguf-q8_0"}
    ratio = next(each for each in result.targets if each.what.startswith("mini, packed"))
    assert (ratio.got, ratio.met) == (1, False)
    calls = (tmp_path / "asked.log").read_text()
    assert run("--out", str(scripted), "--rows", str(rows), "--threads", "1") == 0
    assert (tmp_path / "asked.log").read_text() == calls, "everything was there but what had failed, and that failed at load"
    assert run("--out", str(scripted), "--seed", "1") == 2
    assert "holds another run" in capsys.readouterr().err


def test_cells_are_listed_without_measuring(scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list", "--only", "packed/*") == 0
    shown = capsys.readouterr().out
    assert "packed/onnx-int8/64" in shown and "ladder/" not in shown and "in all" in shown
    assert not scripted.exists() and not (tmp_path / "asked.log").exists()
    assert run("--list", "--only", "nothing/*") == 2 and run("--suite", "short") == 2
    assert "--out" in capsys.readouterr().err


def test_only_what_was_asked_for_is_measured(scripted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", str(scripted), "--only", "length/onnx-int8/23/*") == 0
    assert {each.id for each in read_result(scripted / "result.json").cells if each.group != "memory"} == {
        "length/onnx-int8/23/safe", "length/onnx-int8/23/unsafe"}
    capsys.readouterr()


def test_profiles_cover_what_targets_read() -> None:
    for each in suite.SUITES.values():
        assert {length.tokens for length in each.lengths} == {23, 128, 512, 2048, 8000}
    assert lengths.LONGEST == 8000
