from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import write_gguf, write_llama_2, write_smollm

from edgeguard import profiles
from edgeguard.answers import Answers, State
from edgeguard.errors import ModelMismatchError
from edgeguard.tokenizer import GgufTokenizer, JsonTokenizer

CODES = [f"S{number}" for number in range(1, 12)]


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer: Path) -> JsonTokenizer:
    return JsonTokenizer.load(llama3_tokenizer)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    return JsonTokenizer.load(write_smollm(tmp_path_factory.mktemp("smollm") / "tokenizer.json"))


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    return JsonTokenizer.load(write_llama_2(tmp_path_factory.mktemp("llama2") / "tokenizer.json"))


@pytest.fixture(scope="module")
def guard2(llama3: JsonTokenizer) -> Answers:
    return Answers.build(profiles.get("llama-guard-2"), CODES, llama3)


@pytest.fixture(scope="module")
def mini(smollm: JsonTokenizer) -> Answers:
    return Answers.build(profiles.get("edgeguard-mini"), CODES, smollm)


def read(answers: Answers, ids: list[int]) -> State:
    state = State()
    for id_ in ids:
        state = answers.steps(state)[id_]
    return state


def test_llama_guard_2_answers(guard2: Answers) -> None:
    assert guard2.lead_in == ()
    assert guard2.safe == ((19193,), (6220,), (26747,))
    assert guard2.unsafe == ((39257,), (20451,), (79870,))
    assert guard2.line == (198,)
    assert guard2.ends == (128001, 128009)
    assert guard2.first == tuple((50, id_) for id_ in (*range(16, 25), 605, 806))
    assert guard2.following == tuple((21861, id_) for id_ in (*range(16, 25), 605, 806))
    assert set(guard2.ids) == {19193, 6220, 26747, 39257, 20451, 79870, 198, 50, *range(16, 25), 605, 806, 21861, 128001, 128009}
    assert list(guard2.ids) == sorted(guard2.ids)


def test_llama_guard_2_list_of_two(guard2: Answers) -> None:
    start = guard2.settle(State())
    assert start == State((), (50,))  # every code begins with S
    one = guard2.steps(start)[16]
    assert guard2.steps(one).keys() == {21861, 128001, 128009}
    two = guard2.settle(guard2.steps(one)[21861])
    assert guard2.steps(two).keys() == {*range(17, 25), 605, 806}  # not the first code again
    ended = guard2.steps(guard2.steps(two)[605])[128009]
    assert ended.ended
    assert ended == State((0, 9))
    assert guard2.path(ended) == (50, 16, 21861, 605)
    assert guard2.steps(ended) == {}
    assert guard2.settle(ended) == ended


def test_digits_one_by_one_make_a_code_the_start_of_others(mini: Answers, smollm: JsonTokenizer) -> None:
    s, one, zero, comma = (smollm.encode_text(text)[0] for text in ("S", "1", "0", ","))
    assert len(mini.unsafe[0]) == 2
    assert mini.first[9] == (s, one, zero)
    state = read(mini, [s, one])
    assert mini.steps(state).keys() == {zero, one, comma, *mini.ends}
    assert mini.possible(state) == [0, 9, 10]
    assert read(mini, [s, one, comma]) == State((0,), (comma,))
    # once S1 is listed, S and 1 can only become S10 or S11
    again = read(mini, [s, one, comma, s, one])
    assert mini.steps(again).keys() == {zero, one}
    assert mini.settle(read(mini, [s, one, zero, comma, s, one, comma, s, one])) == State((9, 0), (comma, s, one, one))


def test_lead_in_is_the_profiles(llama3: JsonTokenizer) -> None:
    answers = Answers.build(profiles.get("llama-guard-3-8b"), [f"S{number}" for number in range(1, 15)], llama3)
    assert answers.lead_in == (271,)
    assert answers.ends == (128009, 128001)


def test_llama_guard_1_on_a_vocabulary_that_puts_spaces_in_front(llama2: JsonTokenizer) -> None:
    profile = profiles.get("llama-guard-1")
    answers = Answers.build(profile, [category.code for category in profile.policy.categories], llama2)
    names = [[llama2._tokenizer.id_to_token(id_) for id_ in form] for form in (*answers.safe, *answers.unsafe)]
    assert names == [["safe"], ["▁safe"], ["Sa", "fe"], ["un", "safe"], ["▁unsafe"], ["Un", "safe"]]
    assert [llama2._tokenizer.id_to_token(id_) for id_ in answers.line] == ["<0x0A>"]
    assert [llama2._tokenizer.id_to_token(id_) for id_ in answers.following[5]] == [",", "O", "6"]
    assert answers.ends == (2,)


def test_beginning_common_to_all_forms_is_forced(smollm: JsonTokenizer) -> None:
    profile = replace(profiles.get("edgeguard-mini"), safe_forms=("[safe",), unsafe_forms=("[unsafe",))
    answers = Answers.build(profile, CODES, smollm)
    assert smollm.decode(answers.lead_in) == "["
    assert smollm.decode(answers.safe[0]) == "safe"
    assert smollm.decode(answers.unsafe[0]) == "unsafe"


@pytest.mark.parametrize(("safe", "unsafe"), [
    (("[safe", "safe"), ("[unsafe",)), (("safe",), ("safe not",)), (("safe",), ("safe",)),
])
def test_forms_that_begin_alike_are_a_mismatch(smollm: JsonTokenizer, safe: tuple[str, ...], unsafe: tuple[str, ...]) -> None:
    profile = replace(profiles.get("edgeguard-mini"), safe_forms=safe, unsafe_forms=unsafe)
    with pytest.raises(ModelMismatchError) as caught:
        Answers.build(profile, CODES, smollm)
    assert repr(safe[0]) in str(caught.value)
    assert repr(unsafe[0]) in str(caught.value)


def test_forms_of_one_answer_that_begin_alike_count_once(smollm: JsonTokenizer) -> None:
    profile = replace(profiles.get("edgeguard-mini"), unsafe_forms=("unsafe", "unsafe!"))
    assert len(Answers.build(profile, CODES, smollm).unsafe) == 1


@pytest.mark.parametrize("codes", [[], ["S1", "S1"]])
def test_codes_must_be_there_and_differ(smollm: JsonTokenizer, codes: list[str]) -> None:
    with pytest.raises(ModelMismatchError, match="code"):
        Answers.build(profiles.get("edgeguard-mini"), codes, smollm)


def test_codes_that_read_as_a_list_are_a_mismatch(smollm: JsonTokenizer) -> None:
    with pytest.raises(ModelMismatchError, match="'S1'"):
        Answers.build(profiles.get("edgeguard-mini"), ["S1", "S1,S2", "S2"], smollm)


class Melting:
    """A tokenizer that spells a code otherwise once S3 stands somewhere before it."""

    vocab_size, sha256 = 1000, ""

    def encode_text(self, text: str) -> list[int]:
        return [ord(sign) + (500 if sign == "S" and "S3,S" in text[:place] else 0) for place, sign in enumerate(text)]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(id_ - 500 if id_ >= 500 else id_) for id_ in ids)

    def control(self, token: str) -> int:
        return 999

    encode = None


def test_codes_that_depend_on_what_stands_before_are_a_mismatch() -> None:
    profile = profiles.get("edgeguard-mini")
    with pytest.raises(ModelMismatchError, match="depend on what stands before"):
        Answers.build(profile, ["S1", "S2", "S3", "S4", "S5"], Melting())  # type: ignore[arg-type]
    assert Answers.build(profile, ["S1", "S2", "S4"], Melting()).first[0] == (ord("S"), ord("1"))  # type: ignore[arg-type]


class Lossy(Melting):
    """A tokenizer that drops line breaks."""

    def encode_text(self, text: str) -> list[int]:
        return [ord(character) for character in text if character != "\n"]


def test_a_vocabulary_without_the_answers_characters_is_a_mismatch() -> None:
    with pytest.raises(ModelMismatchError, match=r"does not keep '\\n'"):
        Answers.build(profiles.get("edgeguard-mini"), CODES, Lossy())  # type: ignore[arg-type]


def test_missing_end_token_is_a_mismatch(llama3: JsonTokenizer) -> None:
    with pytest.raises(ModelMismatchError, match="im_end"):
        Answers.build(profiles.get("edgeguard-mini"), CODES, llama3)


def test_a_single_code_leaves_no_choice(mini: Answers, smollm: JsonTokenizer) -> None:
    answers = Answers.build(profiles.get("edgeguard-mini"), ["S9"], smollm)
    assert answers.settle(State()) == State((0,))
    assert answers.path(State((0,))) == answers.first[0]


def test_fifty_codes(llama3: JsonTokenizer) -> None:
    codes = [f"S{number}" for number in range(1, 51)]
    answers = Answers.build(profiles.get("llama-guard-2"), codes, llama3)
    assert len(answers.steps(answers.settle(State()))) == 50


def test_llama_cpp_gives_the_same_answers(tmp_path: Path, smollm: JsonTokenizer, mini: Answers) -> None:
    path = write_gguf(write_smollm(tmp_path / "tokenizer.json"), tmp_path / "model.gguf", "smollm")
    assert Answers.build(profiles.get("edgeguard-mini"), CODES, GgufTokenizer.load(path)) == mini


@given(st.lists(st.sampled_from(range(11)), unique=True, min_size=1))
def test_every_list_is_read_and_spelled_as_the_tokenizer_does(guard2: Answers, mini: Answers, llama3: JsonTokenizer,
                                                              smollm: JsonTokenizer, order: list[int]) -> None:
    for answers, tokenizer in ((guard2, llama3), (mini, smollm)):
        ids = tokenizer.encode_text(",".join(CODES[code] for code in order))
        assert read(answers, [*ids, answers.ends[-1]]) == State(tuple(order))
        assert list(answers.path(State(tuple(order)))) == ids
