"""Published sizes of families with experts: gin file -> parameters, and those that a token uses.

A tied table counts once. Figures are billions as published, to as many digits, rounded or cut off;
None where there is none, or where the gin file says why it cannot be made from the published shape.
"""

from __future__ import annotations

# Of the tensors in the repositories on Hugging Face that the gin files name.
EXACT: dict[str, int] = {
    "switch/base_8": 619_339_008,
    "mixtral/8x7b": 46_702_792_704,
    "mixtral/8x22b": 140_620_634_112,
    "qwen3_moe/30b_a3b": 30_532_122_624,
    "qwen3_moe/235b_a22b": 235_093_634_560,
}

PUBLISHED: dict[str, tuple[str, str | None]] = {
    # Fedus et al. 2021 (arXiv:2101.03961), tables 1 and 9
    "switch/base_64": ("3.8", None),
    "switch/base_128": ("7", None),
    "switch/large_128": ("26", None),
    "switch/xxl": ("395", None),
    "switch/c_2048": ("1571", None),
    # Jiang et al. 2024 (arXiv:2401.04088); mistral.ai/news/mixtral-8x22b
    "mixtral/8x7b": ("46.7", "12.9"),
    "mixtral/8x22b": ("141", "39"),
    # The models' pages, and Qwen team 2025 (arXiv:2505.09388)
    "qwen3_moe/30b_a3b": ("30.5", "3.3"),
    "qwen3_moe/235b_a22b": ("235", "22"),
    # Du et al. 2021 (arXiv:2112.06905), abstract and table 4
    "glam/64b_64e": ("1.2e3", "96.6"),
}
# The same table 4: without the token table.
WITHOUT_TABLE: dict[str, tuple[str, str | None]] = {
    "glam/0_1b_64e": ("1.9", None),
    "glam/1_7b_64e": ("27", None),
    "glam/8b_64e": ("143", None),
    "glam/137b": ("137", "137"),
}
# Sizes of our own.
OWN: dict[str, tuple[str, str | None]] = {
    "gemini_like/small": ("1.7", "0.5"),
    "gemini_like/large": ("375", "38"),
}
# Counted beside transformers' model of the same shape only.
UNPUBLISHED = ("switch/base_16", "switch/base_32", "switch/base_256")
