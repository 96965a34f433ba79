"""The pre-training objectives as SeqIO Tasks over any source of text.

`add_tasks("name", ...)` registers, over one token cache,

    name_span_corruption   T5 (https://arxiv.org/abs/1910.10683)
    name_iid_denoising     i.i.d. noise in place of spans
    name_prefix_lm         the rest of a sequence given its start
    name_causal_lm         language modelling of the whole text
    name_ul2               UL2's mixture of seven denoisers, and its Tasks name_ul2_*
    name_masked_lm         BERT (https://arxiv.org/abs/1810.04805): masked tokens of sentence pairs,
                           and which pairs belong together
    name_masked_lm_whole_words     the same with whole words masked
    name_masked_lm_full_sentences  RoBERTa (https://arxiv.org/abs/1907.11692): masked tokens alone
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import seqio
import tensorflow as tf

from t5x_like.data import denoisers, encoder_steps, seqio_sources, seqio_vocabularies


@dataclasses.dataclass(frozen=True)
class WithMode:
    """A denoiser that puts a mode token before the inputs.

    The token's ids are looked up on use: to register a Task must not read its vocabulary.
    """

    denoiser: denoisers.SpanCorruption | denoisers.PrefixLM
    mode: str

    def resolve(self, output_features: Mapping[str, seqio.Feature]) -> denoisers.Preprocessor:
        """The denoiser with the ids that the Task's vocabulary gives to `mode`."""
        vocabulary = output_features["inputs"].vocabulary
        prefix = seqio_vocabularies.token_ids(vocabulary, self.mode)
        return dataclasses.replace(self.denoiser, prefix=prefix)

    def __call__(
        self,
        dataset: tf.data.Dataset,
        sequence_length: Mapping[str, int] | None,
        output_features: Mapping[str, seqio.Feature],
    ) -> tf.data.Dataset:
        return self.resolve(output_features)(dataset, sequence_length, output_features)


# UL2 (https://arxiv.org/abs/2205.05131), table 1: mean span length mu and corruption rate r of the
# R (regular), X (extreme) and S (sequential) denoisers. The S denoiser's one span has the length
# L / 4 and ends the sequence. The paper's own code samples them uniformly unless told otherwise
# (appendix 9.2). The mode tokens are those of the released checkpoint
# (https://huggingface.co/google/ul2).
_TABLE_1 = (
    ("r", "[NLU]", 3, 0.15),
    ("r", "[NLU]", 8, 0.15),
    ("x", "[NLG]", 3, 0.5),
    ("x", "[NLG]", 8, 0.5),
    ("x", "[NLG]", 64, 0.15),
    ("x", "[NLG]", 64, 0.5),
)
UL2_DENOISERS = {
    f"{kind}_mu{mu}_r{round(100 * rate)}": WithMode(
        denoisers.SpanCorruption(mean_noise_span_length=float(mu), noise_density=rate), mode
    )
    for kind, mode, mu, rate in _TABLE_1
} | {"s": WithMode(denoisers.PrefixLM(suffix_density=0.25, concatenate=True), "[S2S]")}


def add_tasks(
    name: str, *, source: seqio.DataSource, vocabulary: seqio.Vocabulary, key: str = "text"
) -> list[str]:
    """Registers the Tasks above over `source`.

    Args:
      name: prefix of their names.
      source: examples whose feature `key` is a document, as bytes.
      vocabulary: tokenizes it. A mode token of UL2 that it lacks is spelt out.
      key: name of that feature.

    Returns:
      Names of what was registered, the Mixture last.
    """
    targets = seqio.Feature(vocabulary, add_eos=True)
    both = {"inputs": seqio.Feature(vocabulary, add_eos=True, required=False), "targets": targets}
    masked = dict.fromkeys(("inputs", "targets"), seqio.Feature(vocabulary, add_eos=False))

    def add(
        suffix: str,
        *steps: denoisers.Preprocessor | WithMode,
        output_features: Mapping[str, seqio.Feature] = both,
    ) -> str:
        seqio.TaskRegistry.add(
            f"{name}_{suffix}",
            source=source,
            preprocessors=[
                functools.partial(seqio_sources.clean_text, key=key),
                functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
                seqio.CacheDatasetPlaceholder(),
                # Bound: of a dataclass, SeqIO would set fields in place of passing arguments.
                *(step.__call__ for step in steps),
            ],
            output_features=output_features,
        )
        return f"{name}_{suffix}"

    eos = denoisers.AppendEos()
    single = [
        add("span_corruption", denoisers.SpanCorruption(), eos),
        add("iid_denoising", denoisers.IIDDenoising(), eos),
        add("prefix_lm", denoisers.PrefixLM(), eos),
        add("causal_lm", denoisers.FullLM(), output_features={"targets": targets}),
    ]
    pairs, mask = encoder_steps.SentencePairs(), encoder_steps.MaskTokens()
    whole_words = dataclasses.replace(mask, whole_words=True)
    single += [
        add("masked_lm", pairs, mask, output_features=masked),
        add("masked_lm_whole_words", pairs, whole_words, output_features=masked),
        add(
            "masked_lm_full_sentences",
            encoder_steps.FullSentences(),
            mask,
            output_features=masked,
        ),
    ]
    ul2 = [add(f"ul2_{kind}", denoiser, eos) for kind, denoiser in UL2_DENOISERS.items()]
    seqio.MixtureRegistry.add(f"{name}_ul2", ul2, default_rate=1.0)
    return [*single, *ul2, f"{name}_ul2"]
