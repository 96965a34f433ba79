"""Published sizes of the GPT line, LongT5 included: gin file -> count and what it counts."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure of a paper or of Hugging Face.

    Attributes:
      count: parameters.
      source: where the figure is from.
      unit: what the figure is a multiple of; 1 where it is exact.
      counted: `all` parameters, a tied token table once; `table_twice`: files that hold a tied
        table under both its names; `no_embeddings`: all but token tables and output kernels;
        `no_norms`: all but the scales of norms.
      rounding: `nearest`, or `down`: LaMDA's 2B, 8B and 137B are 2.10, 8.59 and 137.4.
    """

    count: int
    source: str
    unit: int = 1
    counted: str = "all"
    rounding: str = "nearest"


def _exact(source: str, **counts: int) -> dict[str, Published]:
    return {name: Published(count, source) for name, count in counts.items()}


def _family(family: str, counts: dict[str, Published]) -> dict[str, Published]:
    return {f"{family}/{name}": published for name, published in counts.items()}


_M, _B = 10**6, 10**9
_D1 = "table D.1 of arXiv:2005.14165"
_GOPHER = "table 1 of arXiv:2112.11446"
_PALM = "table 1 of arXiv:2204.02311"
_LAMDA = "table 27 of arXiv:2201.08239"
_FALCON = "safetensors total of tiiuae/falcon-{}"
_LONG = "transformers' LongT5ForConditionalGeneration, configurations of google/long-t5-*"

PUBLISHED: dict[str, Published] = {
    **_family(
        "gpt1", {"117m": Published(116_534_784, "transformers' OpenAIGPTLMHeadModel, openai-gpt")}
    ),
    **_family(
        "gpt2",
        _exact(
            "transformers' GPT2LMHeadModel, openai-community/gpt2*",
            small=124_439_808,
            medium=354_823_168,
            large=774_030_080,
            xl=1_557_611_200,
        ),
    ),
    **_family(
        "gpt3",
        {
            "small": Published(125 * _M, _D1, unit=_M),
            "medium": Published(356 * _M, _D1, unit=_M),
            "large": Published(760 * _M, _D1, unit=_M),
            "xl": Published(1_320 * _M, _D1, unit=10 * _M),
            "2_7b": Published(2_650 * _M, _D1, unit=10 * _M),
            "6_7b": Published(6_660 * _M, _D1, unit=10 * _M),
            "13b": Published(12_850 * _M, _D1, unit=10 * _M),
            "175b": Published(174_600 * _M, _D1, unit=100 * _M),
        },
    ),
    **_family(
        "gpt_neox",
        _exact(
            "table of the model cards EleutherAI/pythia-*, gpt-neox-20b",
            pythia_14m=14_067_712,
            pythia_31m=30_494_720,
            pythia_70m=70_426_624,
            pythia_160m=162_322_944,
            pythia_410m=405_334_016,
            pythia_1b=1_011_781_632,
            pythia_1_4b=1_414_647_808,
            pythia_2_8b=2_775_208_960,
            pythia_6_9b=6_857_302_016,
            pythia_12b=11_846_072_320,
            **{"20b": 20_554_567_680},
        ),
    ),
    # The model card's 6,053,381,344 is 610 * 4096 more. It would fit (our inference) 7 more copies
    # of what Mesh Transformer JAX replicates on 8 shards, and an embedding bias in each.
    **_family(
        "gpt_j",
        {"6b": Published(6_050_882_784, "transformers' GPTJForCausalLM, EleutherAI/gpt-j-6b")},
    ),
    **_family(
        "lamda",
        {
            f"{size}b": Published(
                size * _B, _LAMDA, unit=_B, counted="no_embeddings", rounding="down"
            )
            for size in (2, 8, 137)
        },
    ),
    **_family(
        "gopher",
        {
            "44m": Published(44 * _M, _GOPHER, unit=_M),
            "117m": Published(117 * _M, _GOPHER, unit=_M),
            "417m": Published(417 * _M, _GOPHER, unit=_M),
            "1_4b": Published(1_400 * _M, _GOPHER, unit=100 * _M),
            "7_1b": Published(7_100 * _M, _GOPHER, unit=100 * _M),
            "280b": Published(280 * _B, _GOPHER, unit=_B),
        },
    ),
    **_family("chinchilla", {"70b": Published(70 * _B, "table 4 of arXiv:2203.15556", unit=_B)}),
    **_family(
        "palm",
        {
            "8b": Published(8_630 * _M, _PALM, unit=10 * _M, counted="no_norms"),
            "62b": Published(62_500 * _M, _PALM, unit=10 * _M, counted="no_norms"),
            "540b": Published(540_350 * _M, _PALM, unit=10 * _M, counted="no_norms"),
        },
    ),
    **_family(
        "falcon",
        {
            "rw_1b": Published(1_311_625_216, "transformers' FalconForCausalLM, falcon-rw-1b"),
            "7b": Published(7_217_189_760, _FALCON.format("7b"), counted="table_twice"),
            "40b": Published(41_835_970_560, _FALCON.format("40b"), counted="table_twice"),
            "180b": Published(179_522_565_120, _FALCON.format("180B"), counted="table_twice"),
        },
    ),
    **_family(
        "longt5",
        _exact(
            _LONG,
            local_base=247_577_856,
            local_large=783_150_080,
            local_xl=2_849_757_184,
            tglobal_base=247_587_456,
            tglobal_large=783_175_168,
            tglobal_xl=2_849_807_360,
        ),
    ),
}
# Sizes of our own.
OWN = ("gpt2/tiny", "gpt2/1_3b")
