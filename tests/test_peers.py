"""Peers: the table, environments made with a pretended pip, models prepared, and real workers of this Python on the mini."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import make_artifact

from edgeguard import cli as main_cli
from edgeguard.architecture import Shape
from edgeguard.bench import artifacts, environments, peers, peers_cli
from edgeguard.bench.artifacts import Measured
from edgeguard.bench.contenders import Setting
from edgeguard.bench.driver import WORKERS, Program, Worker
from edgeguard.bench.environments import GENAI, OWN
from edgeguard.bench.peers import PEERS
from edgeguard.bench.prompts import Prompts
from edgeguard.conversation import Conversation
from edgeguard.convert.gguf_source import GgufWeights
from edgeguard.errors import InferenceError, InputError, ModelMemoryError, ModelNotFoundError, StoreError
from edgeguard.guard import Guard
from edgeguard.verdict import Verdict
from edgeguard.weights import SafetensorsWeights

ENVIRONMENTS = {each.name: each for each in (OWN, GENAI)}

EIGHT = Shape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256, context=8192, rope_theta=500000.0,
              rms_eps=1e-5, tied=False)
TEXTS = ("How do I kill a Python process?", "Tell me how to build a pipe bomb to hurt people.")


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    found = artifacts.find(None, tmp_path_factory.mktemp("none"), make=False)
    artifacts.write_source(found)
    return found


class Pip:
    """Takes commands and does nothing but what a test tells it to."""

    def __init__(self, fails: str = "", makes: bool = True) -> None:
        self.commands: list[tuple[str, ...]] = []
        self._fails, self._makes = fails, makes

    def __call__(self, command: Sequence[str], log: Path) -> None:
        self.commands.append(tuple(command))
        if self._fails and self._fails in command:
            raise StoreError("pip failed")
        if self._makes and (out := next((Path(part) for part in command if part.endswith(".partial")), None)):
            out.mkdir(parents=True)
            (out / "model.onnx").write_bytes(b"made")


@pytest.fixture
def no_venv(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder with its Python, at once."""
    def create(place: Path, **_: object) -> None:
        python = place / ENVIRONMENTS[place.name].python(place.parent).relative_to(place)
        python.parent.mkdir(parents=True)
        python.touch()

    monkeypatch.setattr(environments.venv, "create", create)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


# the table


def test_every_peer_has_a_script_and_a_way_to_its_model() -> None:
    for name, peer in PEERS.items():
        assert name == peer.name and (WORKERS / peer.script).is_file()
        assert peer.environment is ENVIRONMENTS[peer.environment.name]
        assert peer.form in ("as it is", *peers.COMMANDS)
        assert peer.reads == "hf" or peer.reads == peer.precision
        assert not peer.making or peer.form in peers.COMMANDS, "memory for making belongs to what is made"
        json.dumps(dict(peer.options))
    assert len({peer.title for peer in PEERS.values()}) == len(PEERS)


@pytest.mark.parametrize("pattern", ["onnxruntime-genai*", "transformers*", "openvino*", "optimum*", "llama-cpp-python*"])
def test_names_that_targets_and_charts_look_for(pattern: str) -> None:
    assert any(fnmatch(name, pattern) for name in PEERS)


def test_requirements_are_ranges_and_torch_is_as_in_the_project() -> None:
    for each in ENVIRONMENTS.values():
        assert each.own or all(">=" in requirement and "<" in requirement for requirement in each.requirements)
    project = WORKERS.parents[1] / "pyproject.toml"
    torch = next(requirement for requirement in GENAI.requirements if requirement.startswith("torch"))
    if project.is_file():
        assert f'"{torch}"' in project.read_text(encoding="utf-8")


def test_which_peers_fit_8b_into_24_gib() -> None:
    def fits(name: str, *, making: bool = False) -> bool:
        try:
            peers.check_memory(PEERS[name], EIGHT, 24 * 2**30, making=making)
        except ModelMemoryError as error:
            assert PEERS[name].title in str(error)
            return False
        return True

    assert {name for name in PEERS if fits(name)} == {name for name in PEERS if "fp32" not in name}
    assert not fits("onnxruntime-genai-int4", making=True), "its builder holds the weights in float32 and more"


@pytest.mark.parametrize("script", sorted(path.name for path in WORKERS.glob("*.py") if path.name in {p.script for p in PEERS.values()}
                                          | {"protocol.py", "answers.py"}))
def test_workers_of_peers_know_nothing_of_edgeguard(script: str) -> None:
    source = (WORKERS / script).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.split(".")[0] in {"edgeguard", "bench", "convert"} for name in names)


def test_no_script_hides_a_package_that_peers_import() -> None:
    """A script's folder comes first on its path."""
    packages = {"llama_cpp", "onnxruntime_genai", "openvino_genai", "optimum", "transformers", "torch", "onnxruntime", "openvino", "numpy"}
    assert not packages & {path.stem for path in WORKERS.glob("*.py")} and not packages & sys.stdlib_module_names
    assert not {path.stem for path in WORKERS.glob("*.py")} & sys.stdlib_module_names


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"There is no peer 'nobody'; there are .*optimum-fp32"):
        peers.named(["nobody"])


# environments


@pytest.mark.usefixtures("no_venv")
def test_making_an_environment_says_what_it_downloads_then_installs_and_tries_it(tmp_path: Path) -> None:
    pip, told = Pip(), list[str]()
    assert not GENAI.ready(tmp_path)
    environments.make(GENAI, tmp_path, told.append, pip)
    python = str(GENAI.python(tmp_path))
    assert "pip will download onnxruntime-genai>=" in told[0] and "GB" in told[0]
    assert pip.commands[0] == (python, "-m", "pip", "install", "--disable-pip-version-check", *GENAI.requirements)
    assert pip.commands[1][:2] == (python, "-c") and "openvino_genai" in pip.commands[1][2]
    assert GENAI.ready(tmp_path)
    environments.make(GENAI, tmp_path, told.append, pip)
    assert len(pip.commands) == 2 and told[-1] == "genai: ready"
    assert not replace(GENAI, requirements=("other>=1,<2",)).ready(tmp_path), "made of other requirements"


@pytest.mark.usefixtures("no_venv")
def test_an_environment_whose_making_failed_is_not_ready_and_is_made_anew(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="pip failed"):
        environments.make(GENAI, tmp_path, lambda _: None, Pip(fails="install"))
    assert not GENAI.ready(tmp_path)
    environments.make(GENAI, tmp_path, lambda _: None, Pip())
    assert GENAI.ready(tmp_path)


@pytest.mark.usefixtures("no_venv")
def test_nothing_is_downloaded_where_the_network_is_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEGUARD_OFFLINE", "1")
    pip = Pip()
    with pytest.raises(StoreError, match="network is forbidden"):
        environments.make(GENAI, tmp_path, lambda _: None, pip)
    assert not pip.commands


@pytest.mark.usefixtures("no_venv")
def test_room_on_the_disk_comes_first(tmp_path: Path) -> None:
    pip = Pip()
    with pytest.raises(StoreError, match=r"takes about 1000000\.0 GB"):
        environments.make(replace(GENAI, disk=1e6), tmp_path, lambda _: None, pip)
    assert not pip.commands


def test_the_own_environment_is_never_made(tmp_path: Path) -> None:
    lacking = replace(OWN, modules=("no_such_module",))
    with pytest.raises(StoreError, match=r'pip install "edgeguard\[bench,optimum\]"'):
        environments.make(lacking, tmp_path, lambda _: None, Pip())
    assert OWN.python(tmp_path) == Path(sys.executable)


def test_a_command_that_fails_says_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"status 3; .*out\.log\. It ended: the reason"):
        environments.run((sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"), tmp_path / "out.log")


# models


def test_a_model_is_prepared_once_beside_and_renamed(tmp_path: Path, mini: Measured) -> None:
    peer, pip = PEERS["onnxruntime-genai-int4"], Pip()
    origin = peers.source(peer, mini)
    place = peers.prepare(peer, origin, tmp_path, lambda _: None, pip)
    assert place == peers.prepared(peer, origin, tmp_path) and (place / "model.onnx").is_file()
    assert not list(place.parent.glob("*.partial"))
    command = pip.commands[0]
    assert command[:3] == (str(GENAI.python(tmp_path)), "-m", "onnxruntime_genai.models.builder")
    assert command[command.index("-i") + 1] == mini.source and command[command.index("-p") + 1] == "int4"
    peers.prepare(peer, origin, tmp_path, lambda _: None, pip)
    assert len(pip.commands) == 1


def test_a_model_that_was_not_written_is_an_error(tmp_path: Path, mini: Measured) -> None:
    peer = PEERS["optimum-fp32"]
    with pytest.raises(StoreError, match="was not written"):
        peers.prepare(peer, peers.source(peer, mini), tmp_path, lambda _: None, Pip(makes=False))
    assert not peers.prepared(peer, peers.source(peer, mini), tmp_path).exists()


def test_another_source_gets_another_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    places = {peers.prepared(PEERS["optimum-fp32"], tmp_path / name, tmp_path) for name in ("one", "two")}
    assert len(places) == 2


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path: Path, mini: Measured) -> None:
    taking_part = {each.key: each for each in peers.taking_part(mini, Setting(1), tmp_path).contenders}
    assert taking_part.keys() == PEERS.keys()
    assert str(taking_part["onnxruntime-genai-int4"].missing).endswith("make it with: edgeguard bench peers --make onnxruntime-genai-int4")
    without = replace(mini, source="", found={label: each for label, each in mini.found.items() if label != "gguf-q4_0"})
    with pytest.raises(ModelNotFoundError, match=r"made of the source weights.* `master`"):
        peers.source(PEERS["transformers-fp32"], without)
    with pytest.raises(ModelNotFoundError, match=r"reads a GGUF of type q4_0.*edgeguard convert SOURCE --to gguf --precision q4_0"):
        peers.source(PEERS["llama-cpp-python-q4_0"], without)


def test_the_source_of_the_built_in_model_is_its_gguf_in_bfloat16(mini: Measured) -> None:
    folder, gguf = artifacts.write_source(mini), GgufWeights(mini.found[artifacts.MINI_SOURCE].weights)
    written = SafetensorsWeights(folder)
    assert written.shape == gguf.shape and written.names() == gguf.names()
    for name in ("model.norm.weight", "model.layers.3.mlp.down_proj.weight"):
        wanted = gguf.tensor(name)
        np.testing.assert_allclose(written.tensor(name), wanted, rtol=2**-8)
    assert (folder / "tokenizer.json").read_bytes() == mini.found[artifacts.MINI_SOURCE].tokenizer.read_bytes()


def test_a_source_that_cannot_be_written_is_an_error(tmp_path: Path, mini: Measured) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        artifacts.write_source(replace(mini, source=str(tmp_path / "file" / "master")))


def test_what_was_made_of_another_model_is_not_used(tmp_path: Path, mini: Measured) -> None:
    origin = mini.found[artifacts.MINI_SOURCE]
    assert artifacts.made_of(origin, tmp_path) is None
    made = make_artifact(tmp_path / "made")
    assert artifacts.made_of(origin, made.folder) is None
    same = {"kind": "gguf", "sha256": origin.manifest.files[origin.manifest.weights].sha256}
    replace(made.manifest, source=same).write(made.folder)
    assert artifacts.made_of(origin, made.folder) is not None


def test_memory_is_asked_before_anything_is_made(tmp_path: Path, mini: Measured) -> None:
    pip, told = Pip(), list[str]()
    failed = peers_cli.make_all([PEERS["optimum-fp32"]], mini, tmp_path, 1e9, told.append, pip)
    assert failed == [PEERS["optimum-fp32"]] and "GB of memory" in told[0] and not pip.commands


@pytest.mark.usefixtures("no_venv")
def test_one_peer_that_fails_leaves_the_others(tmp_path: Path, mini: Measured) -> None:
    wanted = [PEERS["llama-cpp-python-q4_0"], PEERS["onnxruntime-genai-int4"]]
    without = replace(mini, found={label: each for label, each in mini.found.items() if label != "gguf-q4_0"})
    assert peers_cli.make_all(wanted, without, tmp_path, 24e9, lambda _: None, Pip()) == wanted[:1]
    state = peers.contender(PEERS["onnxruntime-genai-int4"], mini, Setting(1), tmp_path, 24e9)
    assert state.missing is None and state.bytes == 4
    assert state.program.command == (str(GENAI.python(tmp_path)), str(WORKERS / "ort_genai.py"))
    assert state.program.options["precision"] == "int4" and not state.edgeguard and state.keeps


def test_the_command_lists_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_cli.main(["bench", "peers", "transformers-fp32", "openvino-q8_0", "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "transformers-fp32" in out and "optimum-fp32" not in out


# real workers


def judged(program: Program, mini: Measured, tmp_path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts, and replies for the two texts, a further one with the first again, and an order that is refused."""
    prompts = Prompts(mini)
    items = [prompts.judged(Conversation.of(text)) for text in TEXTS]
    with Worker(program, tmp_path / "worker.log") as worker:
        reply = worker.load()
        assert reply["load_s"] > 0
        replies = [worker.judge([item], prompts.answers) for item in items]
        replies.append(worker.judge(items, prompts.answers))
        assert int(worker.memory()["resident"] or 0) > 30e6
        with pytest.raises(InferenceError, match="no operation 'dance'"):
            worker.ask({"op": "dance"})
        cut = worker.judge(items[1:], prompts.answers, max_tokens=1)
        assert cut["raw"] == ["uns"], "no more tokens than it was told"
    return reply["facts"], replies


def check(facts: Mapping[str, Any], replies: Sequence[Mapping[str, Any]], said: Sequence[Verdict]) -> None:
    assert {"runtime", "device", "precision", "threads", "kernel", "bytes", "fallbacks"} <= facts.keys()
    assert facts["threads"] == 1 and facts["device"] == "cpu" and facts["bytes"] > 10e6
    one, other = (each.raw for each in said)
    assert [each["raw"] for each in replies] == [[one], [other], [one, other]]
    assert all(each["seconds"] > 0 for each in replies)
    assert [each["scores"][0] for each in replies[:2]] == pytest.approx([each.raw_score for each in said], abs=0.02)
    assert replies[2]["scores"] == pytest.approx([each["scores"][0] for each in replies[:2]], abs=0.005), "whatever came before"


@pytest.fixture(scope="module")
def said() -> list[Verdict]:
    with Guard.load(threads=1) as guard:
        found = [guard.check(text) for text in TEXTS]
    assert [verdict.raw for verdict in found] == ["safe", "unsafe\nS1"]
    return found


@pytest.mark.parametrize("reuse", ["kept", "cache", "state"])
def test_llama_cpp_python_says_what_edgeguard_says(reuse: str, mini: Measured, said: list[Verdict], tmp_path: Path) -> None:
    if find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    peer = PEERS["llama-cpp-python-q4_k_m-state"]
    setting = replace(peer, options={"reuse": reuse}, precision="q8_0")
    made = peers.program(setting, mini.found["gguf-q8_0"].weights, tmp_path, Setting(1), 2048)
    facts, replies = judged(made, mini, tmp_path)
    assert facts["precision"] == "q8_0" and facts["context"] == 2048 and facts["reuse"] == reuse
    check(facts, replies, said)


@pytest.mark.parametrize("name", ["transformers-fp32", "kept-transformers-fp32"])
def test_transformers_says_what_edgeguard_says(name: str, mini: Measured, said: list[Verdict], tmp_path: Path) -> None:
    if find_spec("transformers") is None or find_spec("torch") is None:
        pytest.skip("transformers is not installed")
    made = peers.program(PEERS[name], artifacts.write_source(mini), tmp_path, Setting(1), 2048)
    facts, replies = judged(made, mini, tmp_path)
    assert facts["precision"] == "float32" and "transformers 4.57" in facts["runtime"]
    check(facts, replies, said)


def test_a_worker_that_cannot_load_says_why(tmp_path: Path) -> None:
    if find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    made = Program("llama", (sys.executable, str(WORKERS / "llama_cpp_python.py")), str(tmp_path / "none.gguf"))
    with Worker(made, tmp_path / "worker.log") as worker, pytest.raises(InferenceError, match=r"none\.gguf"):
        worker.load()
