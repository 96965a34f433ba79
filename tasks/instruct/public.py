"""Registers the public collections that TFDS has, over TFDS and T5's vocabulary.

Those with choices also as `NAME_rank`, scored by the log-likelihood of each choice.

For other sources and vocabularies, call `register.add_tasks` in a module of your own. `flan_like`
is the mixture of all of them, by size with FLAN's cap (arXiv:2109.01652, section 2.4).
"""

import seqio

from tasks.c4 import T5_VOCABULARY
from tasks.instruct.rank import RANKS, add_rank_tasks
from tasks.instruct.register import add_mixture, add_tasks
from tasks.instruct.schemas.all import COLLECTIONS

CAP = 3_000
_vocabulary = seqio.SentencePieceVocabulary(T5_VOCABULARY, extra_ids=100)

for _name, _collection in COLLECTIONS.items():
    if _collection.tfds:
        _source = seqio.TfdsDataSource(tfds_name=_collection.tfds)
        add_tasks(_name, _collection, source=_source, vocabulary=_vocabulary)
        if _name in RANKS:
            add_rank_tasks(_name, _name, source=_source, vocabulary=_vocabulary)

add_mixture("flan_like", [n for n, c in COLLECTIONS.items() if c.tfds], cap=CAP)
