"""Vocabularies with and without TensorFlow give the same ids."""

from __future__ import annotations

import copy
import pickle

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from t5x_like.data import cache_format, vocabularies
from t5x_like.data.cache_format import OutputFeature, TaskManifest
from t5x_like.errors import UserError

TEXT = ["In the beginning was the Word, and the Word was with God.", "Jesus wept. 漢字 café"] * 20
KJV = "tasks/kjv/vocabulary.model"


def t5_like(path) -> str:
    """Unigram pieces, padding at 0, sentinels at the end in T5's order."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    sentinels = [AddedToken(f"<extra_id_{i}>", special=True) for i in reversed(range(10))]
    tokenizer.add_special_tokens(sentinels)
    tokenizer.save(str(path))
    return str(path)


def gpt2_like(path) -> str:
    """Byte-level BPE: id 0 is an ordinary token, the only special one ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(params=["bytes", "sentencepiece", "t5_like", "gpt2_like"])
def vocabulary(request, tmp_path) -> vocabularies.Vocabulary:
    makers = {"t5_like": t5_like, "gpt2_like": gpt2_like}
    if request.param in makers:
        return vocabularies.load(makers[request.param](tmp_path / "tokenizer.json"))
    return vocabularies.load({"bytes": "bytes", "sentencepiece": KJV}[request.param])


def test_round_trip_and_layout(vocabulary):
    spec = vocabulary.spec
    ids = vocabulary.encode(TEXT[0])
    assert vocabulary.decode(ids) == TEXT[0]
    assert vocabulary.decode([*ids, spec.eos_id, 5, 0]) == TEXT[0]
    first_sentinel = spec.size - spec.extra_ids
    assert all(0 < i < first_sentinel and i != spec.eos_id for i in ids)
    assert spec.pad_id == 0
    if spec.kind != "bytes":
        assert "<extra_id_0>" in vocabulary.decode([*ids, spec.size - 1])
        assert "<extra_id_3>" in vocabulary.decode([spec.size - 4, *ids])


def test_seqio_gives_the_same_ids(vocabulary):
    import tensorflow as tf

    from t5x_like.data import seqio_vocabularies

    wrapped = seqio_vocabularies.to_seqio(vocabulary)
    assert seqio_vocabularies.spec_of(wrapped) == vocabulary.spec
    assert wrapped.vocab_size == vocabulary.spec.size
    for text in (TEXT[0], ""):
        ids = vocabulary.encode(text)
        assert list(wrapped.encode(text)) == ids
        assert wrapped.encode_tf(text).numpy().tolist() == ids
        assert wrapped.decode(ids) == text
    ids = vocabulary.encode(TEXT[0])
    assert wrapped.decode_tf(tf.constant([ids, ids])).numpy().tolist() == [TEXT[0].encode()] * 2
    assert copy.deepcopy(wrapped) == wrapped
    assert pickle.loads(pickle.dumps(wrapped)) == wrapped


def test_hugging_face_sentinels_and_ids(tmp_path):
    t5 = vocabularies.load(t5_like(tmp_path / "t5.json")).spec
    tokenizer = Tokenizer.from_file(str(tmp_path / "t5.json"))
    assert (t5.zero_is_token, t5.eos_id, t5.unk_id, t5.extra_ids) == (False, 1, 2, 10)
    assert t5.size - 1 == tokenizer.token_to_id("<extra_id_0>")

    gpt2 = vocabularies.load(gpt2_like(tmp_path / "gpt2.json")).spec
    tokenizer = Tokenizer.from_file(str(tmp_path / "gpt2.json"))
    assert (gpt2.zero_is_token, gpt2.unk_id, gpt2.extra_ids) == (True, None, 100)
    assert gpt2.eos_id == tokenizer.token_to_id("<|endoftext|>")
    assert gpt2.size == tokenizer.get_vocab_size() + 100


def test_end_of_sequence_from_the_config_beside_the_file(tmp_path):
    path = gpt2_like(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "W"}}')
    eos = vocabularies.load(path).spec.eos_id
    assert eos == Tokenizer.from_file(path).token_to_id("W")


def test_mode_tokens_are_one_id_or_spelt_out():
    import seqio

    from t5x_like.data.seqio_vocabularies import token_ids

    kjv = seqio.SentencePieceVocabulary(vocabularies.find_file(KJV), extra_ids=100)
    assert token_ids(kjv, "[NLU]") == (3,)
    assert token_ids(seqio.ByteVocabulary(), "[NLU]") == tuple(b + 3 for b in b"[NLU]")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.model", "There is no file 'nowhere.model'"),
        ("t5", "Unknown vocabulary 't5'"),
        ("pyproject.json", "There is no file"),
    ],
)
def test_unknown_vocabulary(name, message):
    with pytest.raises(UserError, match=message):
        vocabularies.load(name)


def test_bad_tokenizer_files(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(UserError, match=r"bad\.json is not a Hugging Face"):
        vocabularies.load(str(bad))
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.save(str(bad))
    vocabularies.load.cache_clear()
    with pytest.raises(UserError, match="no end-of-sequence token"):
        vocabularies.load(str(bad))


def test_another_vocabulary_is_an_error(tmp_path):
    cached = vocabularies.load(KJV).spec
    task = TaskManifest(
        name="t", kind="task", output_features={"targets": OutputFeature(vocabulary=cached)}
    )
    cache_format.check_vocabulary(task, {"targets": cached})
    with pytest.raises(UserError, match="another vocabulary for 'targets': sentencepiece of 8192"):
        cache_format.check_vocabulary(task, {"targets": vocabularies.Bytes().spec})


def test_from_spec_notices_a_changed_file(tmp_path):
    path = t5_like(tmp_path / "t5.json")
    spec = vocabularies.load(path).spec
    assert vocabularies.from_spec(spec).spec == spec
    vocabularies.load.cache_clear()
    gpt2_like(path)
    with pytest.raises(UserError, match="has changed"):
        vocabularies.from_spec(spec)
