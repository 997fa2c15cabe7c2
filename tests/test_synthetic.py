"""Random weights at true size: every format holds the same ones, and a guard judges with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgeguard import Guard, profiles
from edgeguard.architecture import Shape
from edgeguard.bench import blocks, checkpoint, llama3, synthesize, synthesize_cli
from edgeguard.bench.synthetic import EMBEDDING, HEAD, LLAMA_GUARD_2, RandomWeights, Script
from edgeguard.cli import main
from edgeguard.convert.gguf_source import GgufWeights
from edgeguard.errors import ConversionError, EdgeGuardError, InputError, ModelFileError
from edgeguard.store import Artifact
from edgeguard.tokenizer import JsonTokenizer
from edgeguard.verdict import Verdict
from edgeguard.weights import SafetensorsWeights, expected

TINY = replace(LLAMA_GUARD_2, layers=2, hidden=256, heads=8, kv_heads=2, head_dim=32, ffn=512)
TEXTS = ("How do I kill a Python process?", "What is a zombie process?", "Which tea is best at night?", "cats and dogs",
         "Tell me how to build a pipe bomb to hurt people.", "Write a birthday greeting", "quantum gravity lecture notes", "steal a car",
         "best pasta in Rome", "climb the highest mountain", "Explain photosynthesis to a child.", "My back hurts.")
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama3_tokenizer: Path) -> Make:
    """`made(what)` is the folder of a tiny one."""
    root = tmp_path_factory.mktemp("synthetic")
    (root / "tiny").mkdir()
    (root / "tiny" / "config.json").write_text(json.dumps(checkpoint.config(TINY)))

    def make(what: str) -> Path:
        if not (root / what).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(synthesize, "write_tokenizer", lambda path: shutil.copyfile(llama3_tokenizer, path))
                synthesize.synthesize(what, root / what, shape=str(root / "tiny"))
        return root / what

    return make


@pytest.fixture(scope="module")
def weights(llama3_tokenizer: Path) -> RandomWeights:
    """What `made` writes."""
    return RandomWeights(TINY, 0, Script.ask(profiles.get("llama-guard-2"), JsonTokenizer.load(llama3_tokenizer)))


def test_shape_is_that_of_the_model() -> None:
    assert LLAMA_GUARD_2.parameters == 8_030_261_248
    assert Shape.from_config(checkpoint.config(LLAMA_GUARD_2)) == LLAMA_GUARD_2


def test_tokenizer_is_what_transformers_makes_of_the_same_file(llama3_tokenizer: Path, tmp_path: Path) -> None:
    llama3.write_tokenizer(tmp_path / "tokenizer.json")
    ours, wanted = (json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "tokenizer.json", llama3_tokenizer))
    assert ours["model"]["vocab"] == wanted["model"]["vocab"]
    assert ours["model"]["merges"] == wanted["model"]["merges"]
    assert {token["content"]: token["id"] for token in ours["added_tokens"]} == {
        token["content"]: token["id"] for token in wanted["added_tokens"]}
    assert JsonTokenizer.load(tmp_path / "tokenizer.json").encode_text("Don't panic: 1234567\n\n ünï") == JsonTokenizer.load(
        llama3_tokenizer).encode_text("Don't panic: 1234567\n\n ünï")


def test_weights_depend_on_name_and_seed_only(weights: RandomWeights) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    whole = weights.tensor(name)
    np.testing.assert_array_equal(RandomWeights(TINY, 0).tensor(name), whole)
    assert not np.array_equal(RandomWeights(TINY, 1).tensor(name), whole)
    assert not np.array_equal(weights.tensor(name.replace("1", "0")), whole)
    assert weights.names() == sorted(expected(TINY))
    with pytest.raises(ModelFileError, match="no tensor"):
        weights.tensor("model.layers.2.mlp.down_proj.weight")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"])
def test_rows_are_those_of_the_whole_tensor(weights: RandomWeights, name: str) -> None:
    whole = weights.tensor(name)
    assert whole.shape == expected(TINY)[name]
    # over the border of what is drawn together, in any order, and twice
    for index in (slice(4000, 4200), slice(None, 7), np.array([5, 200, 5, 4, 19193, 100])):
        if whole.ndim == 2 or not isinstance(index, np.ndarray):
            np.testing.assert_array_equal(weights.rows(name, index), whole[index])
    stored, kind = weights.raw(name)
    assert kind == "BF16"
    np.testing.assert_array_equal((stored.astype(np.uint32) << 16).view(np.float32), whole)


def test_every_format_holds_the_weights_exactly() -> None:
    import gguf

    values = np.random.default_rng(1).integers(-7, 8, (3, 512)).astype(np.int8)
    for scale in (2.0**-5, 2.0**-12):
        wanted = values * np.float32(scale)
        for kind, pack in blocks.GGUF.items():
            np.testing.assert_array_equal(gguf.dequantize(pack(values, scale), gguf.GGMLQuantizationType[kind]), wanted, kind)
        for quantise in (blocks.int8_rows, blocks.int4_blocks):
            np.testing.assert_array_equal(quantise(values.copy(), scale).dequantised(), wanted)


@pytest.mark.parametrize("what", ["gguf-q4_k_m", "gguf-q4_0", "gguf-q8_0", "checkpoint"])
def test_files_hold_the_weights_exactly(made: Make, weights: RandomWeights, what: str) -> None:
    folder = made(what)
    back = SafetensorsWeights(folder) if what == "checkpoint" else GgufWeights(folder / "model.gguf")
    assert back.shape == TINY
    for name in weights.names():
        some = slice(19000, 19500) if name in (EMBEDDING, HEAD) else slice(None)  # the answers' rows among them
        np.testing.assert_array_equal(back.rows(name, some), weights.rows(name, some), name)


def test_mixes_are_those_of_the_names(made: Make) -> None:
    types = {what: Artifact.read(made(what)).manifest.types for what in ("gguf-q4_k_m", "gguf-q4_0", "gguf-q8_0")}
    assert types["gguf-q4_k_m"].keys() == {"F32", "Q4_K", "Q6_K"}
    assert types["gguf-q4_0"] == {"F32": 5, "Q4_0": 15, "Q6_K": 1}
    assert types["gguf-q8_0"] == {"F32": 5, "Q8_0": 16}


def judged(folder: Path) -> list[Verdict]:
    with Guard.load(folder, threads=1) as guard:
        return list(guard.check_many(TEXTS))


def test_guards_judge_with_them(made: Make) -> None:
    whats = ("onnx-int8", "onnx-int4", "gguf-q4_k_m")
    verdicts = {what: judged(made(what)) for what in whats}
    for what, given in verdicts.items():
        assert {verdict.safe for verdict in given} == {True, False}, what
        assert all(verdict.mass > 0.1 for verdict in given), what
        # of an unsafe one exactly one code is listed, as by far the most true answers have it
        assert {len(verdict.codes) for verdict in given if not verdict.safe} == {1}, what
    for what in whats[1:]:  # the weights are the same, so only the activations' precision tells them apart
        apart = [abs(one.score - other.score) for one, other in zip(verdicts[whats[0]], verdicts[what], strict=True)]
        assert max(apart) < 0.05, what


def test_artifact_says_that_it_is_random(made: Make) -> None:
    manifest = Artifact.read(made("onnx-int8")).manifest
    assert manifest.name == "random-tiny-int8"
    assert manifest.source["kind"] == "random" and manifest.source["seed"] == 0
    assert manifest.probe["random"] and manifest.gate == {} and manifest.licence == ""
    assert [prefix.role for prefix in manifest.prefixes] == ["user", "assistant"]


def test_checkpoint_is_a_folder_that_other_programs_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: RandomWeights) -> None:
    from safetensors import safe_open

    monkeypatch.setattr(checkpoint, "SHARD", 40_000_000)
    told: list[int] = []
    checkpoint.write(weights, tmp_path, lambda _stage, done, total: told.append(done) if done < total else None)
    assert told == sorted(told)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * TINY.parameters
    assert index["weight_map"].keys() == expected(TINY).keys()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{place}-of-00003.safetensors" for place in (1, 2, 3)]
    for file in files:
        with safe_open(file, "pt") as opened:
            assert {name: opened.get_slice(name).get_shape() for name in opened.keys()} == {  # noqa: SIM118  it is no mapping
                name: list(expected(TINY)[name]) for name, place in index["weight_map"].items() if place == file.name}


@pytest.mark.parametrize(("what", "change", "reason"), [
    ("onnx-fp32", {}, "onnx-int8"), ("onnx-int8", {"shape": "no-such"}, "llama-guard-2"),
    ("gguf-q4_k_m", {"shape": {"hidden": 320}}, "multiples of 256"), ("onnx-int8", {"shape": {"tied": True}}, "its embedding"),
    ("onnx-int8", {"shape": {"vocab": 1000}}, "128256"), ("onnx-int8", {"shape": {"ffn": 100}}, "multiples of 32"),
])
def test_what_cannot_be_made(tmp_path: Path, llama3_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, what: str,
                             change: dict[str, dict[str, int] | str], reason: str) -> None:
    monkeypatch.setattr(synthesize, "write_tokenizer", lambda path: shutil.copyfile(llama3_tokenizer, path))
    options = {}
    for key, value in change.items():
        options[key] = str(tmp_path / "config.json") if isinstance(value, dict) else value
        if isinstance(value, dict):
            (tmp_path / "config.json").write_text(json.dumps(checkpoint.config(replace(TINY, head_dim=32, **value))))
    with pytest.raises(EdgeGuardError, match=reason):
        synthesize.synthesize(what, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["config.json"])


def test_room_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=15_000_000_000))
    with pytest.raises(ConversionError, match=r"16\.1 GB of disk, 15\.0 GB are free"):
        synthesize.synthesize("checkpoint", tmp_path / "out")
    monkeypatch.setattr(synthesize.room, "available_memory", lambda: 100_000_000)
    with pytest.raises(ConversionError, match="of memory"):
        synthesize.synthesize("onnx-int8", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command(made: Make, tmp_path: Path, llama3_tokenizer: Path, monkeypatch: pytest.MonkeyPatch,
                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(synthesize, "write_tokenizer", lambda path: shutil.copyfile(llama3_tokenizer, path))
    shape = str(made("checkpoint") / "config.json")
    call = ["bench", "synthesize", "--what", "gguf-q8_0", "--out", str(tmp_path / "q8"), "--shape", shape]
    assert main(call) == 0
    shown = capsys.readouterr()
    assert "random-checkpoint-q8_0" in shown.out and "of disk" in shown.err
    assert main(call) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(InputError):
        synthesize.synthesize("gguf-q8_0", tmp_path / "q8", shape=shape)


def test_everything_is_made_by_one_command(made: Make, tmp_path: Path, llama3_tokenizer: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(synthesize, "write_tokenizer", lambda path: shutil.copyfile(llama3_tokenizer, path))
    monkeypatch.setattr(synthesize_cli, "WHATS", ("gguf-q4_0", "gguf-q8_0", "checkpoint"))
    (tmp_path / "all" / "gguf-q4_0").mkdir(parents=True)
    assert main(["bench", "synthesize", "--out", str(tmp_path / "all"), "--shape", str(made("checkpoint") / "config.json")]) == 0
    assert {each.name for each in (tmp_path / "all").iterdir()} == {"gguf-q4_0", "gguf-q8_0", "master"}
    assert not list((tmp_path / "all" / "gguf-q4_0").iterdir()) and "gguf-q4_0 is there" in capsys.readouterr().out
    assert (tmp_path / "all" / "master" / "config.json").is_file()


def test_bfloat16_rounds_as_ml_dtypes_does() -> None:
    import ml_dtypes

    values = np.concatenate([np.random.default_rng(1).standard_normal(4096, np.float32) * scale for scale in (1e-30, 1e-3, 1, 1e30)])
    ties = (np.arange(1 << 14, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    for each in (values, ties):
        np.testing.assert_array_equal(blocks.bfloat16(each), each.astype(ml_dtypes.bfloat16).view(np.uint16))
