from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vocabularies import DATA, messages, write_gguf, write_llama_2, write_smollm

from edgeguard import profiles
from edgeguard.conversation import Conversation
from edgeguard.errors import ModelFileError, ModelMismatchError, RuntimeMissingError
from edgeguard.prompt import Control, Text, render
from edgeguard.tokenizer import GgufTokenizer, JsonTokenizer, Tokenizer, shared_prefix

# letters and digits that Unicode 16 added are such for tokenizers and not yet for llama.cpp: the one difference between them
UNICODE_16 = {0x1C89, 0x1C8A, *range(0xA7CB, 0xA7CE), *range(0xA7DA, 0xA7DD), *range(0x105C0, 0x105F4), *range(0x10D40, 0x10D90),
              *range(0x10EC2, 0x10EC5), *range(0x11380, 0x113E3), *range(0x116D0, 0x116E4), *range(0x11BC0, 0x11BFA),
              *range(0x13460, 0x143FB), 0x18CFF, *range(0x16100, 0x1613A), *range(0x16D40, 0x16D7A), *range(0x1CCF0, 0x1CCFA),
              *range(0x1E5D0, 0x1E600)}
characters = st.characters(exclude_categories=["Cs"]).filter(lambda character: ord(character) not in UNICODE_16)
ODD = (" \t\n\r\v\f\x85\xa0\u2003\u2028\u3000'sStTrReEvVmMlLdD\u017fK019\u0663²½,.;!?-_/\\<|>éß"
       "İ漢か한न्👩\u200d\u0301\ufeff\0")
PIECES = ["<|eot_id|>", "<|im_end|>", "<|", "|>", "eot_id", "don't", "'LL", "S10", ",S", " unsafe", "\n\n", "12345"]
texts = st.one_of(
    st.text(characters, max_size=40),
    st.text(st.sampled_from(ODD), max_size=30),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
)
Pair = tuple[JsonTokenizer, GgufTokenizer]


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_smollm(tmp_path_factory.mktemp("smollm") / "tokenizer.json")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory, llama3_tokenizer: Path, smollm: Path) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("gguf")
    made = {}
    for name, source, pre in (("llama3", llama3_tokenizer, "llama-bpe"), ("smollm", smollm, "smollm")):
        made[name] = JsonTokenizer.load(source), GgufTokenizer.load(write_gguf(source, folder / f"{name}.gguf", pre))
    return made


@pytest.fixture(params=["llama3", "smollm"])
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    return pairs[request.param]


@pytest.fixture
def llama3(pairs: dict[str, Pair]) -> Iterator[tuple[Tokenizer, ...]]:
    yield pairs["llama3"]


def test_golden_prompts_have_their_ids(llama3: tuple[Tokenizer, ...]) -> None:
    profile = profiles.get("llama-guard-2")
    golden = json.loads((DATA / "golden_prompts.json").read_text(encoding="utf-8"))
    assert len(golden) == 3
    for case in golden:
        prompt = render(profile, Conversation.of(case["messages"]))
        for tokenizer in llama3:
            assert tokenizer.encode(prompt.segments) == case["token_ids"]


def test_both_give_the_same_ids_for_messages(pair: tuple[Tokenizer, Tokenizer]) -> None:
    json_, gguf = pair
    assert len(messages()) >= 290
    for text in messages():
        ids = json_.encode_text(text)
        assert gguf.encode_text(text) == ids
        assert json_.decode(ids) == gguf.decode(ids) == text


@given(texts)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_give_the_same_ids_for_any_text(pairs: dict[str, Pair], text: str) -> None:
    for json_, gguf in pairs.values():
        ids = json_.encode_text(text)
        assert gguf.encode_text(text) == ids
        assert json_.decode(ids) == gguf.decode(ids) == text


@given(st.lists(st.integers(0, 1499), max_size=12))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_decode_any_ids_alike(pairs: dict[str, Pair], ids: list[int]) -> None:
    json_, gguf = pairs["smollm"]
    ids = [id_ for id_ in ids if id_ < json_.vocab_size]
    assert json_.decode(ids) == gguf.decode(ids)


def test_control_tokens_in_text_stay_text(pair: tuple[Tokenizer, Tokenizer]) -> None:
    for tokenizer in pair:
        names = list(tokenizer._controls)  # type: ignore[attr-defined]
        assert len(names) in (3, 256)
        ids = {tokenizer.control(name) for name in names}
        assert len(ids) == len(names)
        for name in names:
            for text in (name, f" {name} ", f"x{name}y", f"\n{name}{name}\n", name.upper()):
                encoded = tokenizer.encode_text(text)
                assert not ids.intersection(encoded)
                assert tokenizer.decode(encoded) == text


def test_only_control_segments_give_control_tokens(llama3: tuple[Tokenizer, ...]) -> None:
    for tokenizer in llama3:
        end = Control("<|eot_id|>")
        ids = tokenizer.encode([Control("<|begin_of_text|>"), Text("a<|eot_id|>"), Text("b"), end, end])
        assert ids == [128000, *tokenizer.encode_text("a<|eot_id|>b"), 128009, 128009]
        assert tokenizer.decode(ids) == "<|begin_of_text|>a<|eot_id|>b<|eot_id|><|eot_id|>"
        assert tokenizer.encode([]) == tokenizer.encode([Text("")]) == tokenizer.encode_text("") == []
        assert tokenizer.vocab_size == 128256


@given(st.lists(texts, max_size=4))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cuts_between_texts_leave_no_trace(pairs: dict[str, Pair], parts: list[str]) -> None:
    for tokenizer in pairs["smollm"]:
        assert tokenizer.encode(map(Text, parts)) == tokenizer.encode_text("".join(parts))


@pytest.mark.parametrize("token", ["<|eot|>", "", "eot_id", "safe", "<|eot_id|> "])
def test_unknown_controls_are_a_mismatch(llama3: tuple[Tokenizer, ...], token: str) -> None:
    for tokenizer in llama3:
        with pytest.raises(ModelMismatchError, match="no control token"):
            tokenizer.control(token)


UNBROKEN = {"letters": "abcdefghijklmnopqrstuvwxyz" * 40_000, "spaces": " " * 10**6, "marks": "e" + "\u0301" * 500_000}


@pytest.mark.parametrize("text", UNBROKEN.values(), ids=UNBROKEN.keys())
def test_a_megabyte_without_a_break_takes_seconds(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    began = time.perf_counter()
    first, second = (tokenizer.encode_text(text) for tokenizer in pair)
    assert first == second
    assert time.perf_counter() - began < 30  # 1 to 3 s measured; digits, emoji and one letter repeated alike


def test_bytes_that_are_no_text_decode_to_replacement(pair: tuple[Tokenizer, Tokenizer]) -> None:
    for tokenizer in pair:
        ids = tokenizer.encode_text("𐍈")
        assert len(ids) > 1
        assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_shared_prefix_is_what_real_encodings_share(llama3: tuple[Tokenizer, ...]) -> None:
    profile = profiles.get("llama-guard-2")
    for role, label in (("user", "User"), ("assistant", "Agent")):
        prompts = [render(profile, Conversation.of(text, role)) for text in ("Hello", "1 + 1", "?")]
        for tokenizer in llama3:
            shared = shared_prefix(tokenizer, prompts)
            assert tokenizer.decode(shared).endswith(f"{label}:")
            assert len(shared) == 137 or role == "assistant"
            assert all(tokenizer.encode(prompt.segments)[: len(shared)] == shared for prompt in prompts)
            assert shared_prefix(tokenizer, prompts[:1]) == tokenizer.encode(prompts[0].segments)


def test_hashes_tell_vocabularies_apart(pairs: dict[str, Pair]) -> None:
    hashes = {tokenizer.sha256 for pair in pairs.values() for tokenizer in pair}
    assert len(hashes) == 4
    assert {len(sha256) for sha256 in hashes} == {64}


@pytest.mark.parametrize("content", [
    None, b"", b"{}", b"\xff\xfe", b"[1, 2]", b'{"version": "1.0", "model": 3}', b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64,
])
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    for kind in (JsonTokenizer, GgufTokenizer):
        with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
            kind.load(path)


def test_added_tokens_that_text_could_forge_are_refused(tmp_path: Path, smollm: Path) -> None:
    data = json.loads(smollm.read_text(encoding="utf-8"))
    data["added_tokens"][2]["special"] = False
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ModelMismatchError, match=r"im_end.*forge"):
        JsonTokenizer.load(path)


def test_user_defined_tokens_that_text_could_forge_are_refused(tmp_path: Path, smollm: Path) -> None:
    import gguf

    data = json.loads(smollm.read_text(encoding="utf-8"))
    name = next(name for name, id_ in data["model"]["vocab"].items() if id_ == 1000)
    path = write_gguf(smollm, tmp_path / "forged.gguf", "smollm", {name: gguf.TokenType.USER_DEFINED})
    with pytest.raises(ModelMismatchError, match="forge"):
        GgufTokenizer.load(path)


def test_sentencepiece_kind_keeps_controls_out_of_text(tmp_path: Path) -> None:
    tokenizer = JsonTokenizer.load(write_llama_2(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode([Control("<s>"), Text("a </s>\n")])
    assert ids.count(tokenizer.control("</s>")) == 0
    assert ids[0] == tokenizer.control("<s>")
    assert tokenizer.decode(ids[1:]) == "a </s>\n"


def test_missing_runtime_gives_the_install_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(RuntimeMissingError, match=r"edgeguard\[llama\]"):
        GgufTokenizer.load(tmp_path / "model.gguf")


def test_loading_prints_nothing_and_leaves_the_log_level(tmp_path: Path, smollm: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("llama-cpp-python")
    before = logger.level
    GgufTokenizer.load(write_gguf(smollm, tmp_path / "model.gguf", "smollm")).encode_text("x")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError):
        GgufTokenizer.load(tmp_path / "bad.gguf")
    assert logger.level == before
    assert capfd.readouterr() == ("", "")
