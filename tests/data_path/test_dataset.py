"""Global batches from the cache: order, hosts, resuming, epochs, and bad input."""

import dataclasses
import json
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from t5x_like.data import cache_format, grain_pipeline
from t5x_like.data.batch_iterator import BatchIterator
from t5x_like.data.converters import Batch, EncDecConverter, LMConverter, PrefixLMConverter
from t5x_like.data.dataset import DatasetConfig
from t5x_like.data.denoisers import AppendEos, FullLM, PrefixLM, SpanCorruption
from t5x_like.errors import UserError
from tests.data_path.conftest import FEATURES, VOCABULARY, Cache, documents


def take(iterator: BatchIterator, count: int) -> list[Batch]:
    return [next(iterator) for _ in range(count)]


def assert_equal(first: Batch, second: Batch) -> None:
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def merge(states: Sequence[dict]) -> dict:
    """Union of hosts' states, through JSON as in a checkpoint."""
    shards = {k: v for state in states for k, v in state["shards"].items()}
    return json.loads(json.dumps({**states[0], "shards": shards}))


@pytest.fixture
def filled(cache: Cache) -> Cache:
    """Tasks "many" (300 documents), "few" (5), and "lm"; "mixture" of the three."""
    cache.add("many", documents(300))
    cache.add("few", documents(5, seed=1), [PrefixLM(suffix_density=0.3), AppendEos()])
    pairs = [{"inputs": d["targets"][:20], "targets": d["targets"][:9]} for d in documents(40)]
    cache.add("pairs", pairs, [AppendEos()])
    cache.add_mixture("mixture", [("many", 2.0), ("few", 0.5), ("pairs", 1.5)])
    return cache


@pytest.mark.parametrize("name", ["many", "few", "pairs", "mixture"])
@pytest.mark.parametrize("pack", [True, False])
def test_hosts_see_the_same_global_batches(filled: Cache, name: str, pack: bool):
    config = filled.config(name, pack=pack)
    batches = take(config.build(), 25)
    spec = config.element_spec
    assert {k: (v.shape, v.dtype) for k, v in batches[0].items()} == spec
    for num_hosts in (2, 4):
        size = 8 // num_hosts
        hosts = [config.build(range(h * size, (h + 1) * size)) for h in range(num_hosts)]
        for batch in batches:
            parts = [next(host) for host in hosts]
            assert_equal(batch, {k: np.concatenate([p[k] for p in parts]) for k in batch})


@pytest.mark.parametrize("name", ["many", "few", "mixture"])
def test_resume_on_another_number_of_hosts(filled: Cache, name: str):
    config = filled.config(name)
    whole = config.build()
    take(whole, 17)
    at_17 = merge([whole.get_state()])
    after = take(whole, 12)

    halves = [config.build(range(4)), config.build(range(4, 8))]
    for half in halves:
        take(half, 17)
    assert merge([half.get_state() for half in halves]) == at_17
    for rows in (range(8), [6, 7], [3]):
        resumed = config.build(rows)
        next(resumed)  # a state also replaces a position that has moved on
        resumed.set_state(at_17)
        assert resumed.get_state()["shards"].items() <= at_17["shards"].items()
        for batch in after:
            assert_equal({k: v[list(rows)] for k, v in batch.items()}, next(resumed))


def test_state_is_small(filled: Cache):
    iterator = filled.config("mixture").build()
    take(iterator, 5)
    assert len(json.dumps(iterator.get_state()["shards"]["3"])) < 60


def test_seed_decides(filled: Cache):
    first, again, other = (next(filled.config("many", seed=s).build()) for s in (1, 1, 2))
    assert_equal(first, again)
    assert not np.array_equal(first["encoder_input_tokens"], other["encoder_input_tokens"])


def words(batches: Iterable[Batch]) -> Counter:
    """How often each token that is a document's own occurs (not EOS, not a sentinel)."""
    tokens = np.concatenate(
        [b[k].ravel() for b in batches for k in ("encoder_input_tokens", "decoder_target_tokens")]
    )
    return Counter(tokens[(tokens > 2) & (tokens < 900)].tolist())


@pytest.mark.parametrize(("name", "count"), [("many", 300), ("few", 5)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_finite_epochs_lose_no_token(filled: Cache, name: str, count: int, shuffle: bool):
    text = Counter(int(t) for d in documents(count, seed=int(name == "few")) for t in d["targets"])
    config = filled.config(name, num_epochs=2, shuffle=shuffle)
    batches = list(config.build())
    assert words(batches) == Counter({token: 2 * n for token, n in text.items()})
    hosts = [config.build(range(4)), config.build(range(4, 8))]
    for batch, *parts in zip(batches, *hosts, strict=True):
        assert_equal(batch, {k: np.concatenate([p[k] for p in parts]) for k in batch})
    # Only the last batch has rows of padding, and these weigh nothing.
    used = [(b["decoder_loss_weights"].sum(1) > 0).tolist() for b in batches]
    assert all(all(rows) for rows in used[:-1])
    assert used[-1] == sorted(used[-1], reverse=True)


def test_evaluation_does_not_depend_on_the_batch_size(filled: Cache):
    def rows(batch_size: int) -> np.ndarray:
        config = filled.config("many", num_epochs=1, shuffle=False, batch_size=batch_size)
        found = np.concatenate([b["decoder_target_tokens"] for b in config.build()])
        return found[found.any(1)]

    np.testing.assert_array_equal(rows(8), rows(3))


def test_resume_of_a_finite_run(filled: Cache):
    config = filled.config("mixture", num_epochs=1)
    batches = list(config.build())
    interrupted = config.build()
    take(interrupted, len(batches) // 2)
    resumed = config.build([1, 5])
    resumed.set_state(merge([interrupted.get_state()]))
    for batch, part in zip(batches[len(batches) // 2 :], resumed, strict=True):
        assert_equal({k: v[[1, 5]] for k, v in batch.items()}, part)


def test_epochs_reshuffle_and_cover_all_documents(cache: Cache):
    """Every window of V rows of consecutive positions is one epoch: each document once."""
    cache.add("ids", [{"inputs": [3], "targets": [i + 3]} for i in range(64)], [AppendEos()])
    iterator = cache.config("ids", pack=False).build()
    epochs = [
        [int(b["decoder_target_tokens"][row, 0]) for b in take(iterator, 8) for row in range(8)]
        for _ in range(4)
    ]
    assert all(sorted(epoch) == list(range(3, 67)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    ordered = cache.config("ids", pack=False, shuffle=False).build()
    first = take(ordered, 8)
    assert sorted(int(b["decoder_target_tokens"][r, 0]) for b in first for r in range(8)) == list(
        range(3, 67)
    )


def test_noise_is_fresh_in_every_epoch(cache: Cache):
    cache.add("one", [{"targets": np.arange(3, 63)}])
    lengths = {"inputs": 64, "targets": 20}
    config = cache.config("one", batch_size=1, task_feature_lengths=lengths)
    inputs = [b["encoder_input_tokens"].tobytes() for b in take(config.build(), 12)]
    assert len(set(inputs)) > 6
    assert [b["encoder_input_tokens"].tobytes() for b in take(config.build(), 12)] == inputs


def test_order_of_many_documents(cache: Cache, monkeypatch):
    """Beyond what is kept in memory, Grain's index shuffle gives the order."""
    cache.add("ids", [{"inputs": [3], "targets": [i + 3]} for i in range(64)], [AppendEos()])
    monkeypatch.setattr(grain_pipeline, "_MOST_IN_MEMORY", 0)
    monkeypatch.setattr("t5x_like.data.cache_reader._TOKENS_IN_MEMORY", 0)
    batches = take(cache.config("ids", pack=False).build(), 16)
    ids = [int(b["decoder_target_tokens"][row, 0]) for b in batches for row in range(8)]
    assert sorted(ids[:64]) == sorted(ids[64:]) == list(range(3, 67))
    assert ids[:64] != ids[64:]


def test_mixture_rates(filled: Cache):
    filled.add("left", [{"inputs": [3], "targets": [4]}] * 50, [AppendEos()])
    filled.add("right", [{"inputs": [5], "targets": [6]}] * 20, [AppendEos()])
    filled.add_mixture("both", [("left", 3.0), ("right", 1.0)])
    batches = take(filled.config("both", pack=False).build(), 500)
    first = np.concatenate([b["encoder_input_tokens"][:, 0] for b in batches])
    share = (first == 3).mean()
    assert abs(share - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 4000)
    # To the end, every example comes once, whatever the rates.
    finite = filled.config("both", pack=False, num_epochs=1).build()
    first = np.concatenate([b["encoder_input_tokens"][:, 0] for b in finite])
    assert Counter(first[first > 0].tolist()) == {3: 50, 5: 20}


def test_decoder_only(cache: Cache):
    cache.add("lm", documents(100), [FullLM()])
    lengths = {"targets": 16}
    config = cache.config("lm", task_feature_lengths=lengths, feature_converter=LMConverter())
    batch = next(config.build())
    assert batch["decoder_input_tokens"].shape == (8, 16)
    cache.add("prefix", documents(100))
    prefix = next(cache.config("prefix", feature_converter=PrefixLMConverter()).build())
    assert prefix["decoder_causal_attention"].shape == (8, 44)


def test_no_tensorflow(filled: Cache):
    program = f"""
        import sys
        from t5x_like.data.dataset import DatasetConfig
        config = DatasetConfig(
            mixture_or_task_name="mixture", task_feature_lengths={{"inputs": 32, "targets": 12}},
            batch_size=8, cache_dir={str(filled.directory)!r}, pack=True,
        )
        assert next(config.build())["encoder_input_tokens"].shape == (8, 32)
        loaded = [m for m in ("tensorflow", "seqio") if m in sys.modules]
        print("loaded:", loaded)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    # Also: the reading thread ends with the interpreter, without a word.
    assert (done.returncode, done.stdout.strip()) == (0, "loaded: []"), done.stderr
    assert "Error" not in done.stderr and "terminate" not in done.stderr


# Bad input


def test_state_of_other_data(filled: Cache):
    state = filled.config("many").build().get_state()
    for changed in ({"seed": 1}, {"batch_size": 4}, {"pack": False}):
        (name,) = changed
        with pytest.raises(UserError, match=f"saved with {name} = "):
            filled.config("many", **changed).build().set_state(state)
    with pytest.raises(UserError, match="mixture_or_task_name = 'many', but this run has 'few'"):
        filled.config("few").build().set_state(state)
    half = filled.config("many").build(range(4)).get_state()
    with pytest.raises(UserError, match=r"no position for shards \['4', '5', '6', '7'\]"):
        filled.config("many").build().set_state(half)
    filled.add("many", documents(300), [SpanCorruption(noise_density=0.1), AppendEos()])
    with pytest.raises(UserError, match="saved with tasks = "):
        filled.config("many").build().set_state(state)


@pytest.mark.parametrize("rows", [[], [8], [-1], [0, 0]])
def test_rows_outside_of_the_batch(filled: Cache, rows: list[int]):
    with pytest.raises(UserError, match="not distinct rows of a batch of 8"):
        filled.config("many").build(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"use_cached": "yes"}, "use_cached is 'yes'"),
        ({"task_feature_lengths": {"targets": 5}}, "length of at least 1 for 'inputs'"),
    ],
)
def test_bad_settings(cache: Cache, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        cache.config("many", **changes)


def test_unknown_names(filled: Cache):
    with pytest.raises(UserError, match=r"'manny' is not in the cache .* Did you mean 'many'"):
        filled.config("manny", use_cached=True).build()
    with pytest.raises(
        UserError, match=r"no split 'trian', only \['train'\]. Did you mean 'train'"
    ):
        filled.config("many", split="trian").build()


def test_lengths_too_short_are_seen_at_once(filled: Cache):
    with pytest.raises(UserError, match="too short for one span"):
        filled.config("many", task_feature_lengths={"inputs": 2, "targets": 12}).build()


def test_another_vocabulary(filled: Cache):
    with pytest.raises(UserError, match=r"another vocabulary: bytes of 1000 ids .*, not bytes of"):
        filled.config("many", vocabulary="bytes").build()


def test_changed_module(filled: Cache, tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text("# not what the cache was made with")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"source of 'my_tasks' changed.*t5x_like cache"):
        filled.config("many", module="my_tasks", use_cached=True).build()


def test_steps_that_need_seqio(cache: Cache):
    cache.add("foreign", documents(3), pipeline=None, not_serializable="mine.preprocess")
    with pytest.raises(UserError, match=r"foreign: mine.preprocess.*use_cached = 'auto'"):
        cache.config("foreign", use_cached=True).build()


def record_file(cache: Cache, fingerprint: str, shard: int = 1):
    corpus = cache_format.corpus_dir(cache.directory, fingerprint)
    return cache_format.record_file(corpus, "train", cache_format.shard_name(shard, 3))


def test_truncated_records(cache: Cache):
    path = record_file(cache, cache.add("many", documents(300)))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"00001-of-00003.arrayrecord has \d+ bytes; its manifest"):
        cache.config("many").build()
    path.unlink()
    with pytest.raises(UserError, match=r"00001-of-00003.arrayrecord is missing"):
        cache.config("many").build()


@pytest.mark.parametrize("in_memory", [True, False])
def test_corrupted_record(cache: Cache, in_memory: bool, monkeypatch):
    if not in_memory:
        monkeypatch.setattr("t5x_like.data.cache_reader._TOKENS_IN_MEMORY", 0)
    path = record_file(cache, cache.add("many", documents(300)))
    data = bytearray(path.read_bytes())
    data[2000:2010] = bytes(10)
    path.write_bytes(data)
    iterator = cache.config("many").build()
    with pytest.raises(UserError, match=r"Record \d+ of .*00001-of-00003.* at byte \d+"):
        take(iterator, 200)


def test_empty_split(cache: Cache):
    fingerprint = cache.add("many", documents(3))
    manifest = cache_format.corpus_dir(cache.directory, fingerprint) / "manifest.json"
    raw = json.loads(manifest.read_text())
    raw["splits"]["train"] |= {"shards": [], "tokens": {"targets": 0}}
    manifest.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"Split 'train' .* is empty"):
        cache.config("many").build()


def test_missing_feature(cache: Cache):
    cache.add("lm", documents(9), [FullLM()])
    with pytest.raises(UserError, match="needs the feature 'inputs', but the task gives"):
        cache.config("lm", feature_converter=EncDecConverter()).build()


def test_vocab_size(filled: Cache):
    assert filled.config("mixture").build().vocab_size == VOCABULARY.size


def test_cache_dir_may_start_with_a_tilde(filled: Cache, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(filled.directory.parent))
    config = filled.config("mixture", cache_dir=f"~/{filled.directory.name}")
    assert config.cache_dir == str(filled.directory)


@pytest.mark.parametrize("pack", [True, False])
def test_an_encoder_needs_padding_that_it_can_tell(pack):
    """Where id 0 is a token, only packed rows say by their segments what padding is."""
    config = DatasetConfig(
        mixture_or_task_name="any",
        task_feature_lengths={"inputs": 8, "targets": 8},
        split="train",
        batch_size=2,
        pack=pack,
        cache_dir="nowhere",
        feature_converter=EncDecConverter(),
    )
    vocabulary = dataclasses.replace(VOCABULARY, zero_is_token=True)
    features = {"inputs": dataclasses.replace(FEATURES["targets"], vocabulary=vocabulary)}
    if pack:
        config.check_vocabulary(features)
        return
    with pytest.raises(UserError, match=r"Id 0 is a token.*set DatasetConfig\.pack = True"):
        config.iterator([], rows=[0], features=features, tasks={})
