"""Published sizes of Llama's and Gemma's kin: gin file -> parameters, a tied table counted once.

A count is that of the tensors in the repository named beside it on Hugging Face ("safetensors" on
its page), except where a comment says how it is made from that.
"""

from __future__ import annotations

# What the multimodal Gemma 3 has besides the text model: SigLIP's tower, and for a text model of
# width d a norm (1152) and a projection (1152, d).
VISION_TOWER = 416_866_032


def _text(total: int, width: int) -> int:
    """Parameters of the text model, from those of the multimodal one."""
    return total - VISION_TOWER - 1152 * (width + 1)


PUBLISHED: dict[str, dict[str, int]] = {
    # huggyllama/llama-*
    "llama1": {
        "7b": 6_738_415_616,
        "13b": 13_015_864_320,
        "30b": 32_528_943_616,
        "65b": 65_285_660_672,
    },
    # meta-llama/Llama-2-*-hf; 34b: codellama/CodeLlama-34b-hf
    "llama2": {
        "7b": 6_738_415_616,
        "13b": 13_015_864_320,
        "34b": 33_743_970_304,
        "70b": 68_976_648_192,
    },
    # meta-llama/Meta-Llama-3-*
    "llama3": {"8b": 8_030_261_248, "70b": 70_553_706_496},
    # meta-llama/Llama-3.1-*
    "llama3_1": {"8b": 8_030_261_248, "70b": 70_553_706_496, "405b": 405_853_388_800},
    # meta-llama/Llama-3.2-*
    "llama3_2": {"1b": 1_235_814_400, "3b": 3_212_749_824},
    # mistralai/Mistral-7B-v0.1, -7B-Instruct-v0.2, -7B-v0.3, -Nemo-Base-2407,
    # -Small-Instruct-2409, -Small-24B-Base-2501, -Large-Instruct-2407
    "mistral": {
        "7b_v0_1": 7_241_732_096,
        "7b_v0_2": 7_241_732_096,
        "7b_v0_3": 7_248_023_552,
        "nemo_12b": 12_247_782_400,
        "small_22b": 22_247_282_688,
        "small_24b": 23_572_403_200,
        "large_123b": 122_610_069_504,
    },
    # 01-ai/Yi-*, 01-ai/Yi-1.5-*
    "yi": {
        "6b": 6_061_035_520,
        "9b": 8_829_407_232,
        "34b": 34_388_917_248,
        "1_5_6b": 6_061_035_520,
        "1_5_9b": 8_829_407_232,
        "1_5_34b": 34_388_917_248,
    },
    # Qwen/Qwen1.5-*; the file of 0.5B holds the tied table twice, 619_570_176 in all
    "qwen1_5": {
        "0_5b": 619_570_176 - 151_936 * 1024,
        "1_8b": 1_836_828_672,
        "4b": 3_950_369_280,
        "7b": 7_721_324_544,
        "14b": 14_167_290_880,
        "32b": 32_512_218_112,
        "72b": 72_287_920_128,
        "110b": 111_209_914_368,
    },
    # Qwen/Qwen2.5-*
    "qwen2_5": {
        "0_5b": 494_032_768,
        "1_5b": 1_543_714_304,
        "3b": 3_085_938_688,
        "7b": 7_615_616_512,
        "14b": 14_770_033_664,
        "32b": 32_763_876_352,
        "72b": 72_706_203_648,
    },
    # Qwen/Qwen3-*; the files of the two smallest hold the tied table twice
    "qwen3": {
        "0_6b": 751_632_384 - 151_936 * 1024,
        "1_7b": 2_031_739_904 - 151_936 * 2048,
        "4b": 4_022_468_096,
        "8b": 8_190_735_360,
        "14b": 14_768_307_200,
        "32b": 32_762_123_264,
    },
    # microsoft/Phi-3-*-instruct
    "phi3": {
        "mini_4k": 3_821_079_552,
        "mini_128k": 3_821_079_552,
        "medium_4k": 13_960_238_080,
    },
    # google/gemma-*
    "gemma1": {"2b": 2_506_172_416, "7b": 8_537_680_896},
    # google/gemma-2-*
    "gemma2": {"2b": 2_614_341_888, "9b": 9_241_705_984, "27b": 27_227_128_320},
    # google/gemma-3-*
    "gemma3": {
        "270m": 268_098_176,
        "1b": 999_885_952,
        "4b": _text(4_300_079_472, 2560),
        "12b": _text(12_187_325_040, 3840),
        "27b": _text(27_432_406_640, 5376),
    },
}
