from __future__ import annotations

import _thread
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard import store
from edgeguard.architecture import Shape
from edgeguard.backends import kernels, onnx_session, packing
from edgeguard.backends.base import Node, Run
from edgeguard.backends.keys_values import keys_and_values
from edgeguard.backends.onnx import OnnxBackend
from edgeguard.backends.reference import ReferenceBackend
from edgeguard.convert.guard_graph import build
from edgeguard.errors import (
    CancelledError,
    ContextLengthError,
    DeadlineError,
    DeviceError,
    InferenceError,
    ModelFileError,
    RuntimeMissingError,
)
from edgeguard.store import Artifact, Manifest, PrefixRecord
from edgeguard.weights import SafetensorsWeights, Weights

HEAD = (1, 5, 700, 19193, 39257, 128009)
PREFIX = [128000, *range(300, 340)]
TEXTS = [[9, 8, 7, 6], list(range(50, 120)), [9, 8, 7, 6, 5, 4], [3], list(range(50, 80)), [9, 8, 7, 6], list(range(1000, 1300))]
Make = Callable[[str, str], Artifact]


def write_manifest(folder: Path, shape: Shape, precision: str, head_ids: tuple[int, ...] = HEAD, **fields: Any) -> Artifact:
    (folder / "tokenizer.json").write_text("{}")
    files = {name: record for name, record in store.records(folder).items() if name != "manifest.json"}
    Manifest(
        name="tiny", kind="onnx", profile="edgeguard-mini", precision=precision, weights="model.onnx", files=files, shape=shape,
        head_ids=head_ids, **fields,
    ).write(folder)
    return Artifact.read(folder)


@pytest.fixture(scope="module")
def weights(tiny_llama: Callable[[str], Path]) -> Callable[[str], Weights]:
    return lambda name: SafetensorsWeights(tiny_llama(name))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, weights: Callable[[str], Weights]) -> Make:
    """`make(model, precision)` is an artifact without prefix files."""
    root = tmp_path_factory.mktemp("artifacts")

    def made(name: str, precision: Any) -> Artifact:
        folder = root / f"{name}-{precision}"
        if not folder.exists():
            source = weights(name)
            build(source, folder, precision=precision, head_ids=HEAD)
            write_manifest(folder, source.shape, precision)
        return Artifact.read(folder)

    return made


@pytest.fixture
def copy(make: Make, tmp_path: Path) -> Make:
    """As `make`, but to be damaged."""
    def made(name: str, precision: str) -> Artifact:
        shutil.copytree(make(name, precision).folder, tmp_path / "copy")
        return Artifact.read(tmp_path / "copy")

    return made


def logits(nodes: list[Node]) -> list[list[float]]:
    return [node.logits.tolist() for node in nodes]


@pytest.mark.parametrize("name", ["plain", "gqa", "wide"])
def test_fp32_equals_the_reference(name: str, make: Make, weights: Callable[[str], Weights]) -> None:
    backend, reference = OnnxBackend(make(name, "fp32"), threads=1), ReferenceBackend(weights(name))
    root, truth = backend.open(PREFIX, Run()), reference.open(PREFIX, Run())
    np.testing.assert_allclose(root.logits, truth.logits[list(HEAD)], atol=1e-4)
    found = backend.extend([(root, text) for text in TEXTS], Run())
    wanted = reference.extend([(truth, text) for text in TEXTS], Run())
    for one, other in zip(found, wanted, strict=True):
        assert one.length == other.length and one.parent is root
        np.testing.assert_allclose(one.logits, other.logits[list(HEAD)], atol=1e-4)


@pytest.mark.parametrize(("name", "precision", "tolerance"), [("plain", "fp16", 0.005), ("wide", "int8", 0.2)])
def test_lower_precisions_are_close_to_the_reference(name: str, precision: str, tolerance: float, make: Make,
                                                     weights: Callable[[str], Weights]) -> None:
    backend, reference = OnnxBackend(make(name, precision), threads=1), ReferenceBackend(weights(name))
    (found,) = backend.extend([(backend.open(PREFIX, Run()), TEXTS[1])], Run())
    (wanted,) = reference.extend([(reference.open(PREFIX, Run()), TEXTS[1])], Run())
    assert wanted.logits.std() > 5 * tolerance
    np.testing.assert_allclose(found.logits, wanted.logits[list(HEAD)], atol=tolerance)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("name", ["plain", "gqa"])
def test_a_result_does_not_depend_on_packing_or_cutting(name: str, precision: str, threads: int, make: Make,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit for int8, whose activations would round another way after the smallest change; 1e-4 is promised for fp32."""
    backend = OnnxBackend(make(name, precision), threads=threads)
    root = backend.open(PREFIX, Run())
    alone = [backend.extend([(root, text)], Run())[0] for text in TEXTS]
    packed = backend.extend([(root, text) for text in TEXTS], Run())
    monkeypatch.setattr(packing.passes, "__kwdefaults__", {"tokens": 19, "score_bytes": packing.MAX_SCORE_BYTES})
    cut = backend.extend([(root, text) for text in TEXTS], Run())
    exact = {"fp32": 1e-4, "int8": 0, "int4": 1e-4}[precision]
    for one, two, three in zip(alone, packed, cut, strict=True):
        np.testing.assert_allclose(one.logits, two.logits, rtol=0, atol=exact)
        np.testing.assert_allclose(one.logits, three.logits, rtol=0, atol=exact)


def test_a_tree_gives_the_same_as_one_sequence(make: Make) -> None:
    backend = OnnxBackend(make("gqa", "int8"), threads=1)
    root = backend.open(PREFIX, Run())
    body = backend.extend([(root, TEXTS[1]), (root, TEXTS[0])], Run())
    leaves = backend.extend([(body[0], [4, 5]), (body[1], [4, 6]), (body[0], [4, 7]), (root, [4])], Run())
    twigs = backend.extend([(leaf, [77, 78]) for leaf in leaves], Run())
    whole = [backend.open([*PREFIX, *middle, *end, 77, 78], Run())
             for middle, end in ((TEXTS[1], [4, 5]), (TEXTS[0], [4, 6]), (TEXTS[1], [4, 7]), ([], [4]))]
    assert logits(twigs) == logits(whole)


def test_shared_beginnings_are_evaluated_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OnnxBackend(make("gqa", "fp32"), threads=1)
    root = backend.open(PREFIX, Run())
    fed: list[int] = []
    run = onnx_session.Session.run
    monkeypatch.setattr(onnx_session.Session, "run",
                        lambda self, outputs, feeds, given: fed.append(len(feeds["ids"])) or run(self, outputs, feeds, given))
    nodes = backend.extend([(root, [5, 6, 7, 1]), (root, [5, 6, 7, 2]), (root, [5, 6])], Run())
    assert fed == [5] and [node.length - root.length for node in nodes] == [4, 4, 2]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_kept_prefix_gives_what_evaluating_it_anew_gives(precision: str, copy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = copy("gqa", precision)
    backend = OnnxBackend(bare, threads=1)
    anew = backend.open(PREFIX, Run())
    keys, values = keys_and_values(anew)
    np.savez(bare.folder / "prefix-user.npz", keys=keys, values=values)
    record = PrefixRecord("user", tuple(PREFIX), "prefix-user.npz", store.sha256(bare.folder / "prefix-user.npz"))
    kept = OnnxBackend(write_manifest(bare.folder, bare.manifest.shape, precision, prefixes=(record,)), threads=1)
    monkeypatch.setattr(onnx_session.Session, "run", None)  # no pass is needed
    restored = kept.open(PREFIX, Run())
    assert restored.length == anew.length and restored.parent is None and not len(restored.logits)
    monkeypatch.undo()
    found = kept.extend([(restored, text) for text in TEXTS], Run())
    wanted = backend.extend([(anew, text) for text in TEXTS], Run())
    assert logits(found) == logits(wanted)


def test_a_damaged_prefix_file_is_an_error(copy: Make) -> None:
    artifact = copy("gqa", "fp32")
    shape, path = artifact.manifest.shape, artifact.folder / "prefix-user.npz"

    def opened(keys: Any, *, flip: bool = False) -> None:
        np.savez(path, keys=keys, values=np.zeros((shape.layers, 3, shape.kv_heads, shape.head_dim), np.float32))
        record = PrefixRecord("user", (1, 2, 3), path.name, store.sha256(path))
        made = write_manifest(artifact.folder, shape, "fp32", prefixes=(record,))
        if flip:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        OnnxBackend(made, threads=1).open([1, 2, 3], Run())

    good = np.zeros((shape.layers, 3, shape.kv_heads, shape.head_dim), np.float32)
    opened(good)
    for keys, flip, match in (
        (good, True, "SHA-256"), (good[:, :2], False, "holds"), (good.swapaxes(1, 2), False, "Convert the model again"),
        (good.astype(np.float16), False, "holds"),
        (np.array([{}]), False, "no prefix file"),
    ):
        with pytest.raises(ModelFileError, match=match):
            opened(keys, flip=flip)


def test_long_contexts_run_in_passes(make: Make) -> None:
    backend = OnnxBackend(make("gqa", "fp32"), threads=1)
    ids = np.random.default_rng(0).integers(0, 128000, 3000).tolist()
    whole = backend.open(ids, Run())
    (joined,) = backend.extend([(backend.open(ids[:1700], Run()), ids[1700:])], Run())
    np.testing.assert_allclose(whole.logits, joined.logits, atol=1e-4)
    with pytest.raises(ContextLengthError, match="8193"):
        backend.extend([(whole, [1] * (8193 - 3000))], Run())


def test_a_long_past_is_never_copied(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """All passes of a call, and what extends it, are fed views of one buffer that begins with the parent's tokens."""
    backend = OnnxBackend(make("gqa", "int8"), threads=1)
    fed: list[Any] = []
    run = onnx_session.Session.run
    monkeypatch.setattr(onnx_session.Session, "run", lambda self, outputs, feeds, given:
                        fed.append(feeds["past_value_1"]) or run(self, outputs, feeds, given))
    root = backend.open(PREFIX, Run())
    (long,) = backend.extend([(root, list(range(700)))], Run())
    leaves = backend.extend([(long, [1, 2, 3]), (long, [1, 2, 4])], Run())
    twigs = backend.extend([(leaves[1], [5]), (leaves[0], [6]), (long, [7])], Run())
    assert [len(past) for past in fed] == [0, 41, 41 + 256, 41 + 512, 41 + 700, 41 + 704]
    assert all(past.base is fed[-1].base and past.flags.c_contiguous for past in fed[2:])
    whole = [backend.open([*PREFIX, *range(700), *end], Run()) for end in ([1, 2, 4, 5], [1, 2, 3, 6], [7])]
    assert logits(twigs) == logits(whole)


def test_a_graph_with_keys_in_another_order_is_refused(copy: Make) -> None:
    import onnx

    artifact = copy("gqa", "fp32")
    model = onnx.load(artifact.weights, load_external_data=False)
    (past,) = (each for each in model.graph.input if each.name == "past_key_0")
    sizes = past.type.tensor_type.shape
    sizes.CopyFrom(type(sizes)(dim=[sizes.dim[1], sizes.dim[0], sizes.dim[2]]))
    artifact.weights.write_bytes(model.SerializeToString())
    with pytest.raises(ModelFileError, match=r"another order|cannot load"):
        OnnxBackend(artifact, threads=1)


def test_cancel_and_deadline_leave_older_nodes_valid(make: Make) -> None:
    backend = OnnxBackend(make("wide", "fp32"), threads=1)
    root = backend.open(PREFIX, Run())
    before = logits(backend.extend([(root, TEXTS[0])], Run()))
    run, long = Run(), list(range(7000))
    threading.Timer(0.05, run.cancel).start()
    start = time.monotonic()
    with pytest.raises(CancelledError):
        backend.extend([(root, long)], run)
    with pytest.raises(DeadlineError):
        backend.extend([(root, long)], Run.within(0.05))
    assert time.monotonic() - start < 5
    with pytest.raises(CancelledError):
        backend.extend([(root, TEXTS[0])], run)
    assert logits(backend.extend([(root, TEXTS[0])], Run())) == before


def test_the_runtime_itself_is_stopped(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only between two passes: the call is cancelled while the only pass runs."""
    backend = OnnxBackend(make("wide", "fp32"), threads=1)
    run, checks = Run(), []
    monkeypatch.setattr(onnx_session, "POLL", 0.0001)
    check = Run.check
    monkeypatch.setattr(Run, "check", lambda self: (check(self), checks.append(1), self.cancel()))
    with pytest.raises(CancelledError):
        backend.open(list(range(256)), run)
    assert len(checks) == 1


def test_ctrl_c_stops_the_runtime() -> None:
    stopped = threading.Event()
    interrupt = threading.Timer(0.1, _thread.interrupt_main)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            onnx_session._stoppable(lambda: stopped.wait(60), Run(), stopped.set)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.is_set(), "and it is waited for"


def test_files_that_are_written_to_while_they_are_used_are_an_error(copy: Make) -> None:
    """They are mapped: other numbers would be in the next pass, and a file cut off would end the process."""
    artifact = copy("plain", "int8")
    backend = OnnxBackend(artifact, threads=1)
    (before,) = backend.extend([(None, PREFIX)], Run())
    data = artifact.folder / "model.onnx.data"
    shutil.copy(data, data.with_suffix(".new"))
    data.with_suffix(".new").replace(data)
    assert logits(backend.extend([(None, PREFIX)], Run())) == logits([before]), "what took the place of a file is another file"
    backend = OnnxBackend(artifact, threads=1)
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size // 2)
    with pytest.raises(ModelFileError, match="written to while it was in use"):
        backend.extend([(None, PREFIX)], Run())


def damage(artifact: Artifact, name: str, number: float) -> None:
    """Overwrite the first number of a float32 tensor."""
    tensors = {each.name: each for each in onnx_session.check_external(artifact.weights)}
    with (artifact.folder / tensors[name].location).open("r+b") as stream:
        stream.seek(tensors[name].offset)
        stream.write(np.float32(number).tobytes())


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_raise(number: float, copy: Make) -> None:
    artifact = copy("plain", "fp32")
    damage(artifact, "model.layers.1.mlp.down_proj.weight", number)
    with pytest.raises(InferenceError, match="not finite"):
        OnnxBackend(artifact, threads=1).open(PREFIX, Run())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_scales_that_are_not_finite_are_refused(precision: str, copy: Make) -> None:
    artifact = copy("plain", precision)
    damage(artifact, "model.layers.1.mlp.up_proj.weight.scale", np.nan)
    with pytest.raises(ModelFileError, match=r"up_proj\.weight\.scale"):
        OnnxBackend(artifact, threads=1)
    OnnxBackend(artifact, threads=1, checked=True)  # the hash would have told


def test_ids_outside_the_vocabulary_raise(make: Make) -> None:
    with pytest.raises(InferenceError, match="ONNX Runtime failed"):
        OnnxBackend(make("plain", "int8"), threads=1).open([128256], Run())


def rewritten(artifact: Artifact, location: str) -> None:
    import onnx

    model = onnx.load(artifact.weights, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    artifact.weights.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/passwd", "C:\\data", "sub\\..\\..\\data", "", "missing.data"])
def test_external_data_stay_in_the_folder(location: str, copy: Make) -> None:
    artifact = copy("plain", "int8")
    shutil.copy(artifact.folder / "model.onnx.data", artifact.folder.parent)
    rewritten(artifact, location)
    with pytest.raises(ModelFileError, match="keeps weights"):
        OnnxBackend(artifact, threads=1)


def test_external_data_behind_a_link_out_are_refused(copy: Make) -> None:
    artifact = copy("plain", "int8")
    data = artifact.folder / "model.onnx.data"
    data.rename(outside := artifact.folder.parent / "outside.data")
    data.symlink_to(outside)
    with pytest.raises(ModelFileError, match="link"):
        OnnxBackend(artifact, threads=1)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x3a\xff\xff\xff\xff\x7f", bytes(1000), b"\x3a\x05hello" * 99])
def test_what_is_no_model_is_refused(content: bytes, copy: Make) -> None:
    artifact = copy("plain", "int8")
    artifact.weights.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"model\.onnx"):
        OnnxBackend(artifact, threads=1)


def test_weights_that_are_cut_off_are_refused(copy: Make) -> None:
    artifact = copy("plain", "fp32")
    with (artifact.folder / "model.onnx.data").open("r+b") as stream:
        stream.truncate(5000)
    with pytest.raises(ModelFileError, match="cannot load"):
        OnnxBackend(artifact, threads=1)


def test_a_manifest_of_another_model_is_refused(copy: Make) -> None:
    artifact = copy("plain", "fp32")
    shape = artifact.manifest.shape
    with pytest.raises(ModelFileError, match="5 layers"):
        OnnxBackend(replace(artifact, manifest=replace(artifact.manifest, shape=replace(shape, layers=5))), threads=1)
    other = OnnxBackend(replace(artifact, manifest=replace(artifact.manifest, head_ids=HEAD[1:])), threads=1)
    with pytest.raises(ModelFileError, match="6 token ids"):
        other.open([1], Run())


def test_what_was_granted_is_reported(make: Make) -> None:
    info = OnnxBackend(make("plain", "int8"), threads=2).info
    assert (info.name, info.device, info.precision, info.threads, info.context) == ("onnx", "cpu", "int8", 2, 8192)
    assert info.runtime.startswith("onnxruntime 1.") and info.head_ids.tolist() == list(HEAD)
    assert OnnxBackend(make("plain", "int8")).info.threads >= 1


@pytest.mark.parametrize("device", ["cuda", "metal", "toaster"])
def test_a_device_that_is_not_there_is_an_error(device: str, make: Make) -> None:
    with pytest.raises(DeviceError, match=rf"'{device}' was asked for; ONNX Runtime offers cpu"):
        OnnxBackend(make("plain", "fp32"), device=device)


def test_two_packages_of_one_runtime_are_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_session, "runtime_conflict", lambda installed: "onnxruntime and onnxruntime-gpu are both installed")
    with pytest.raises(DeviceError, match="both installed"):
        OnnxBackend(make("plain", "fp32"), device="cuda")


def test_only_auto_falls_back_when_a_device_is_listed_but_not_granted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    there, session = ort.get_available_providers(), ort.InferenceSession
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", *there])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", lambda model, options, providers: session(model, options, providers[-1:]))
    assert OnnxBackend(make("plain", "fp32")).info.device == "cpu"
    with pytest.raises(DeviceError, match="not granted"):
        OnnxBackend(make("plain", "fp32"), device="cuda")
    with pytest.raises(DeviceError, match="cpu only"):
        OnnxBackend(make("plain", "int8"), device="cuda")


def test_a_kernel_that_does_not_multiply_rightly_is_not_used(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, str]] = []
    monkeypatch.setattr(kernels, "is_exact", lambda multiply, kernel: asked.append(dict(kernel.entries)) or False)
    with pytest.raises(InferenceError, match="saturate"):
        OnnxBackend(make("plain", "int8"), threads=1)
    assert asked == [{}, dict(kernels.EXACT_X86)]


def test_a_missing_runtime_gives_the_install_line(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(RuntimeMissingError, match=r"edgeguard\[cpu\]"):
        OnnxBackend(make("plain", "fp32"))


def test_empty_entries_and_closed_backends_are_refused(make: Make) -> None:
    backend = OnnxBackend(make("plain", "fp32"), threads=1)
    root = backend.open([1], Run())
    with pytest.raises(ValueError, match="at least one token"):
        backend.extend([(root, [])], Run())
    assert backend.extend([], Run()) == []
    backend.close(root)
    backend.close(root)
    backend.shutdown()
    with pytest.raises(ValueError, match="shut down"):
        backend.open([1], Run())


@pytest.fixture(scope="module")
def export(kept: Path) -> Path:
    """A with-past export by optimum of a small model, and its checkpoint beside it."""
    import torch
    import transformers
    from optimum.exporters.onnx import main_export

    folder = kept / f"export-{transformers.__version__}"
    if not (folder / "onnx" / "model.onnx").exists():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, initializer_range=0.1)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "source")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main_export(str(folder / "source"), output=folder / "onnx", task="text-generation-with-past", do_validation=False)
    return folder


def test_an_ordinary_export_loads_too(export: Path, tmp_path: Path) -> None:
    shutil.copy(export / "onnx" / "model.onnx", tmp_path)
    source = SafetensorsWeights(export / "source")
    backend = OnnxBackend(write_manifest(tmp_path, source.shape, "fp32", ()), threads=1)
    reference = ReferenceBackend(source)
    assert len(backend.info.head_ids) == 512
    texts = [[5, 6], list(range(100, 300)), [9]]
    root, truth = backend.open([1, 2, 3], Run()), reference.open([1, 2, 3], Run())
    found = backend.extend([(root, text) for text in texts], Run())
    wanted = reference.extend([(truth, text) for text in texts], Run())
    found += backend.extend([(found[1], [7, 8]), (found[0], [7])], Run())
    wanted += reference.extend([(wanted[1], [7, 8]), (wanted[0], [7])], Run())
    for one, other in zip(found, wanted, strict=True):
        assert one.length == other.length
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)
    with pytest.raises(ContextLengthError):
        backend.extend([(root, [1] * 510)], Run())


def test_a_graph_of_another_kind_is_refused(tmp_path: Path) -> None:
    import onnx

    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value],
                                   [onnx.helper.make_tensor_value_info("y", 1, [1])])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)])
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    shape = Shape(layers=1, hidden=8, heads=2, kv_heads=1, head_dim=4, ffn=16, vocab=9, context=64, rope_theta=1e4, rms_eps=1e-5,
                  tied=True)
    with pytest.raises(ModelFileError, match="input_ids"):
        OnnxBackend(write_manifest(tmp_path, shape, "fp32", ()), threads=1)
