"""Prefix states on disk: what was written comes back bit for bit, and whatever is wrong is a miss, never an error."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard import Guard, loading, profiles, store
from edgeguard.backends.base import Backend, Node, Run
from edgeguard.backends.llama import LlamaBackend
from edgeguard.backends.onnx import OnnxBackend
from edgeguard.store import PrefixCache, prefix_cache

KEY = {"runtime": "r 1", "ids": "00"}
ARRAYS = {"keys": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "half": np.ones(3, np.float16), "none": np.zeros((0, 2), np.float32),
          "cells": np.arange(7, dtype=np.uint8)}


def held(cache: PrefixCache) -> list[Path]:
    return sorted(cache.folder.glob("*"))


@pytest.fixture
def cache(tmp_path: Path) -> PrefixCache:
    return PrefixCache(tmp_path / "new" / "prefixes", {"model": "m"})


class TestFiles:
    def test_what_was_written_comes_back(self, cache: PrefixCache) -> None:
        assert cache.read(KEY) is None
        cache.write(KEY, ARRAYS)
        found = cache.read(KEY)
        assert found is not None and list(found) == list(ARRAYS)
        for name, array in ARRAYS.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
        assert [path.suffix for path in held(cache)] == [".prefix"], "nothing unfinished stays"
        assert [key for key, _ in cache.entries()] == [{"model": "m", **KEY}]

    def test_every_part_of_the_key_counts(self, cache: PrefixCache) -> None:
        cache.write(KEY, ARRAYS)
        assert cache.read({**KEY, "runtime": "r 2"}) is None
        assert cache.read({**KEY, "more": ""}) is None
        assert PrefixCache(cache.folder, {"model": "other"}).read(KEY) is None
        assert PrefixCache(cache.folder, {"model": "other"}).entries() == []
        assert cache.read(KEY) is not None

    def test_a_file_under_another_name_is_a_miss(self, cache: PrefixCache) -> None:
        cache.write(KEY, ARRAYS)
        cache.write({**KEY, "ids": "01"}, ARRAYS)
        one, other = held(cache)
        one.write_bytes(other.read_bytes())
        assert [cache.read(KEY) is None, cache.read({**KEY, "ids": "01"}) is None].count(True) == 1
        assert held(cache) == [other]

    def test_damage_anywhere_is_a_miss_and_the_file_goes(self, cache: PrefixCache) -> None:
        cache.write(KEY, ARRAYS)
        (path,) = held(cache)
        data = path.read_bytes()
        damaged = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1:] for at in range(0, len(data), 5)]
        for wrong in (*damaged, b"", data[:30], data[:-1], data + b"x", b"edgeguard-prefix-1\n", os.urandom(300)):
            path.write_bytes(wrong)
            assert cache.read(KEY) is None
            assert not path.exists()

    def test_a_header_that_lies_is_a_miss(self, cache: PrefixCache, monkeypatch: pytest.MonkeyPatch) -> None:
        for header in (b"[]", b"{}", b'{"key": 1, "arrays": []}', b"[" * 5000, b"\xff"):
            monkeypatch.setattr(prefix_cache, "_canonical", lambda value, header=header: header if "arrays" in value else b"name")
            cache.write(KEY, ARRAYS)
            assert len(held(cache)) == 1
            assert cache.read(KEY) is None
            assert held(cache) == []

    def test_what_is_no_file_is_not_waited_for(self, cache: PrefixCache) -> None:
        cache.write(KEY, ARRAYS)
        (path,) = held(cache)
        path.unlink()
        path.mkdir()
        assert cache.read(KEY) is None
        cache.write(KEY, ARRAYS)
        assert cache.read(KEY) is None and cache.entries() == []

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
    def test_a_disk_that_is_full_or_read_only_is_no_error(self, cache: PrefixCache, monkeypatch: pytest.MonkeyPatch,
                                                          number: int) -> None:
        def refuse(*given: Any, **options: Any) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", refuse)
            cache.write(KEY, ARRAYS)
        assert held(cache) == [], "what is unfinished is removed"
        monkeypatch.setattr(Path, "mkdir", refuse)
        PrefixCache(cache.folder / "deeper", {}).write(KEY, ARRAYS)
        monkeypatch.setattr(prefix_cache.np, "fromfile", refuse)
        assert cache.read(KEY) is None

    def test_a_home_that_is_a_file_is_no_error(self, tmp_path: Path) -> None:
        (tmp_path / "home").write_text("")
        cache = PrefixCache(tmp_path / "home" / "prefixes", {})
        cache.write(KEY, ARRAYS)
        assert cache.read(KEY) is None and cache.entries() == []

    def test_the_least_recently_used_leave(self, cache: PrefixCache, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prefix_cache, "MOST_FILES", 3)
        for place in range(3):
            cache.write({"ids": str(place)}, ARRAYS)
        for path in held(cache):
            os.utime(path, (1, 1))
        assert cache.read({"ids": "0"}) is not None
        cache.write({"ids": "3"}, ARRAYS)
        cache.write({"ids": "4"}, ARRAYS)
        assert [cache.read({"ids": str(place)}) is not None for place in range(5)] == [True, False, False, True, True]

    def test_bytes_are_bounded(self, cache: PrefixCache, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prefix_cache, "MOST_BYTES", 5000)
        cache.write({"ids": "large"}, {"cells": np.zeros(5001, np.uint8)})
        assert not cache.folder.exists()
        for place in range(9):
            cache.write({"ids": str(place)}, {"cells": np.zeros(1500, np.uint8)})
            assert sum(path.stat().st_size for path in held(cache)) <= 5000 + 200
        assert cache.read({"ids": "8"}) is not None

    def test_what_others_left_unfinished_goes_when_it_is_old(self, cache: PrefixCache) -> None:
        cache.folder.mkdir(parents=True)
        for name, age in (("old.1-1.partial", 7200), ("new.1-1.partial", 10)):
            (cache.folder / name).write_bytes(b"x")
            os.utime(cache.folder / name, (time.time() - age,) * 2)
        cache.write(KEY, ARRAYS)
        assert [path.name for path in held(cache) if path.suffix == ".partial"] == ["new.1-1.partial"]

    def test_many_writers_and_readers_at_once(self, cache: PrefixCache, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prefix_cache, "MOST_FILES", 3)
        arrays = {place: {"cells": np.full(20_000, place, np.uint8)} for place in range(5)}

        def work(step: int) -> bool:
            place = step % 5
            cache.write({"ids": str(place)}, arrays[place])
            found = cache.read({"ids": str(place)})
            return found is None or bool((found["cells"] == place).all())

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(80)))
        assert not list(cache.folder.glob("*.partial"))


RANDOM = np.random.default_rng(3)
PREFIX, OTHER = [[1, *map(int, RANDOM.integers(10, 9000, count))] for count in (52, 35)]
MESSAGES = [list(map(int, RANDOM.integers(10, 9000, count))) for count in (40, 3, 17)]
Opened = Callable[..., Backend]


def open_onnx(cache: PrefixCache | None, **options: Any) -> Backend:
    found = store.resolve(None, ("onnx",))
    assert isinstance(found, store.Artifact)
    return OnnxBackend(found, threads=1, cache=cache, **options)


def open_llama(cache: PrefixCache | None, **options: Any) -> Backend:
    return LlamaBackend(store.resolve(None, ("gguf",)).weights, threads=1, context=512, cache=cache, **options)


@pytest.fixture(params=[open_onnx, open_llama], ids=["onnx", "llama"])
def opened(request: pytest.FixtureRequest) -> Iterator[Opened]:
    backends: list[Backend] = []

    def make(*given: Any, **options: Any) -> Backend:
        backends.append(request.param(*given, **options))
        return backends[-1]

    yield make
    for backend in backends:
        backend.shutdown()


def play(backend: Backend) -> list[np.ndarray]:
    """Logits of two prefixes, of texts alone and together, and of what comes behind one of them."""
    root = backend.open(PREFIX, Run())
    found = [root.logits]
    for message in MESSAGES:
        (node,) = backend.extend([(root, message)], Run())
        found.append(node.logits)
        backend.close(node)
    other = backend.open(OTHER, Run())
    nodes: list[Node] = backend.extend([(root, MESSAGES[0]), (other, MESSAGES[1]), (root, MESSAGES[2])], Run())
    nodes += backend.extend([(nodes[0], MESSAGES[1])], Run())
    return [*found, other.logits, *(node.logits for node in nodes)]


class TestBackends:
    def test_restored_is_evaluated_bit_for_bit_and_costs_no_pass(self, opened: Opened, cache: PrefixCache,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
        wanted, first = play(opened(None)), play(opened(cache))
        assert len(held(cache)) == 2
        backend = opened(cache)
        working: Any = backend._running[0] if isinstance(backend, OnnxBackend) else backend._session  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            for work in ("extend", "decode"):
                patch.setattr(working, work, lambda *_: pytest.fail("a prefix was evaluated"), raising=False)
            backend.close(backend.open(OTHER, Run()))
        again = play(backend)
        for one, two, three in zip(wanted, first, again, strict=True):
            np.testing.assert_array_equal(two, one)
            np.testing.assert_array_equal(three, one)

    def test_another_model_runtime_or_thread_count_and_damage_are_misses(self, opened: Opened, cache: PrefixCache) -> None:
        backend = opened(cache)
        wanted = backend.open(PREFIX, Run()).logits
        assert len(held(cache)) == 1
        opened(PrefixCache(cache.folder, {"model": "other"})).open(PREFIX, Run())
        assert len(held(cache)) == 2
        changed = opened(cache)
        if isinstance(changed, OnnxBackend):
            graph, key = changed._running
            changed._state = graph, {**key, "runtime": f"{key['runtime']} later"}
        else:
            changed._key = {**changed._key, "runtime": changed._key["runtime"] + " later"}  # type: ignore[attr-defined]
        changed.open(PREFIX, Run())
        assert len(held(cache)) == 3
        for path in held(cache):
            data = bytearray(path.read_bytes())
            data[-40] ^= 4
            path.write_bytes(data)
        np.testing.assert_array_equal(opened(cache).open(PREFIX, Run()).logits, wanted)
        np.testing.assert_array_equal(opened(cache).open(PREFIX, Run()).logits, wanted)

    def test_a_state_of_other_sizes_is_a_miss(self, opened: Opened, cache: PrefixCache) -> None:
        wanted = opened(cache).open(PREFIX, Run()).logits
        (key, _), = cache.entries()
        whole = cache.read({name: value for name, value in key.items() if name != "model"})
        assert whole is not None
        rest = {name: value for name, value in key.items() if name != "model"}
        last = list(whole)[-1]
        for wrong in ({"logits": whole["logits"]}, {**whole, "logits": whole["logits"][1:]}, {**whole, "logits": np.zeros(3, np.uint8)},
                      {**whole, last: whole[last].reshape(-1)[:-1]}, {**whole, "more": np.zeros(2, np.uint8)}):
            cache.write(rest, wrong)
            np.testing.assert_array_equal(opened(cache).open(PREFIX, Run()).logits, wanted)


class TestLoading:
    def test_the_cache_is_in_the_home_and_names_model_and_profile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGEGUARD_HOME", str(tmp_path / "home"))
        verdicts = []
        for _ in range(2):
            with Guard.load(backend="llama", threads=1) as guard:
                verdicts.append(guard.check("How do I kill a process?").score)
        assert verdicts[0] == verdicts[1]
        assert [path.suffix for path in (tmp_path / "home" / ".cache" / "prefixes").iterdir()] == [".prefix"]
        model = store.resolve(None, ("gguf",))
        cache = loading.prefix_cache(model, profiles.get("edgeguard-mini"))
        assert cache is not None
        assert [key["profile"] for key, _ in cache.entries()] == ["edgeguard-mini"]
        assert store.digest(model) != store.digest(store.resolve(None, ("onnx",)))

    def test_a_bare_gguf_is_hashed_once_and_not_at_all_where_that_cannot_be_kept(self, tmp_path: Path,
                                                                                monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGEGUARD_HOME", str(tmp_path / "home"))
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
        model = store.resolve(tmp_path / "m.gguf")
        read: list[Path] = []
        hashed = store.files.sha256
        monkeypatch.setattr(store.files, "sha256", lambda path, progress=None: (read.append(path), hashed(path, progress))[1])
        assert store.digest(model, known=True) == ""
        assert store.digest(model) == store.digest(model) == store.digest(model, known=True) == hashed(tmp_path / "m.gguf")
        assert len(read) == 1
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(101))
        assert store.digest(model, known=True) == ""
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("EDGEGUARD_HOME", str(tmp_path / "file" / "home"))
        assert store.digest(model) == ""
        assert loading.prefix_cache(model, profiles.get("edgeguard-mini")) is None
        assert len(read) == 1
