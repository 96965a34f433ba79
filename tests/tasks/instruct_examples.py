"""An example of each public collection in the schema of its publisher; the texts are made up."""

from __future__ import annotations

from typing import Any

_SQUAD = {
    "id": "5733be284776f41900661182",
    "title": "Rivers",
    "context": "The Elbe (Czech: Labe) rises in Bohemia. It's 1,094 km long and ends at Cuxhaven.",
    "question": "Where does the Elbe rise?",
    "answers": {"text": ["Bohemia", "in Bohemia."], "answer_start": [32, 29]},
}
_NLI = {"premise": "A boat lies in the harbour.", "hypothesis": "There is a boat.", "label": 0}
_COPA = {
    "premise": "The ice melted.",
    "choice1": "The sun came out.",
    "choice2": "It grew cold.",
    "question": "cause",
    "idx": 4,
    "label": 0,
}
_TWO = {"sentence1": "It rained all day.", "sentence2": "There was rain.", "idx": 3}

# As TFDS gives them; a list has several examples.
TFDS: dict[str, Any] = {
    "glue_cola": {"sentence": "The sailors rides tide.", "label": 0, "idx": 9},
    "glue_sst2": {"sentence": "a moving , well-made film ", "label": 1, "idx": 1},
    "glue_mrpc": _TWO | {"label": 1},
    "glue_qqp": {
        "question1": "How do I learn to sail?",
        "question2": "What is a good way to learn sailing?",
        "label": 1,
        "idx": 2,
    },
    "glue_stsb": [_TWO | {"label": 3.5}, _TWO | {"label": 2.0}],
    "glue_mnli": [_NLI | {"idx": 1}, _NLI | {"label": 2, "idx": 2}, _NLI | {"label": -1, "idx": 3}],
    "glue_qnli": {
        "question": "When was the bridge built?",
        "sentence": "The bridge was built in 1902.",
        "label": 0,
        "idx": 1,
    },
    "glue_rte": _TWO | {"label": 0},
    "glue_wnli": _TWO | {"label": 1},
    "super_glue_boolq": {
        "question": "do all rivers end in the sea",
        "passage": "Some rivers end in a lake or dry out.",
        "label": 0,
        "idx": 7,
    },
    "super_glue_cb": _NLI | {"label": 1, "idx": 5},
    "super_glue_copa": [_COPA, _COPA | {"question": "effect", "label": 1}],
    "super_glue_multirc": {
        "paragraph": "<b>Sent 1: </b>Ann sold her boat.<br><b>Sent 2: </b>She bought a house.",
        "question": "What did Ann <b>buy</b>?",
        "answer": "A house",
        "label": 1,
        "idx": {"paragraph": 1, "question": 2, "answer": 3},
    },
    "super_glue_record": {
        "passage": "Ann Lee went to Oslo.\n@highlight\nIt took a week\n@highlight\nIt rained",
        "query": "It rained while @placeholder was at sea.",
        "entities": ["Ann Lee", "Oslo"],
        "answers": ["Ann Lee", "Lee"],
        "idx": {"passage": 1, "query": 2},
    },
    "super_glue_rte": {
        "premise": "Oslo is the capital of Norway.",
        "hypothesis": "Norway has a capital.",
        "label": 0,
        "idx": 1,
    },
    "super_glue_wic": {
        "word": "bank",
        "sentence1": "He sat on the bank of the river.",
        "sentence2": "The bank was closed.",
        "start1": 14,
        "start2": 4,
        "end1": 18,
        "end2": 8,
        "idx": 3,
        "label": 0,
    },
    "super_glue_wsc": [
        {
            "text": "Ann told Mary that she had won a prize.",
            "span1_index": 0,
            "span2_index": 4,
            "span1_text": "Ann",
            "span2_text": "she",
            "idx": 1,
            "label": 1,
        },
        {
            "text": "When she came home, Mary Lee was tired.",
            "span1_index": 4,
            "span2_index": 1,
            "span1_text": "Mary Lee",
            "span2_text": "she",
            "idx": 2,
            "label": 0,
        },
    ],
    "bool_q": {
        "question": "is a whale a fish",
        "title": "Whale",
        "answer": False,
        "passage": "Whales are mammals that live in the sea.",
    },
    **{
        f"anli_r{i}": {
            "uid": "a1",
            "context": "Oslo lies at the end of a fjord.",
            "hypothesis": "Oslo lies on a mountain.",
            "label": 2,
        }
        for i in (1, 2, 3)
    },
    "squad": _SQUAD,
    "trivia_qa": {
        "question": "Which river flows through Dresden?",
        "question_id": "tc_1",
        "question_source": "http://example.org/",
        "entity_pages": [],
        "search_results": [],
        "answer": {
            "value": "The Elbe",
            "aliases": ["Elbe", "Labe"],
            "normalized_aliases": ["elbe", "labe"],
            "matched_wiki_entity_name": "",
            "normalized_matched_wiki_entity_name": "",
            "normalized_value": "elbe",
            "type": "WikipediaEntity",
        },
    },
    "natural_questions": {
        "question": "who built the first lighthouse",
        "answer": ["Sostratus", "S."],
    },
    "gsm8k": {
        "question": "Tom has 3 boxes of 4 pens and gives 2 pens away. How many are left?",
        "answer": "Tom has 3*4=<<3*4=12>>12 pens.\nHe has 12-2=<<12-2=10>>10 left.\n#### 10",
        "annotation": "...",
        "short_answer": "10",
    },
    "hellaswag": {
        "context": "[header] How to tie a knot [title] Take a rope. [step] Then you",
        "endings": ["eat it.", "make a loop.", "sleep.", "fly away."],
        "activity_label": "Tying knots",
        "label": 1,
        "split_type": "indomain",
        "source_id": "wikihow~1",
    },
    "wmt14_en_de": {"en": "That is good.", "de": "Das ist gut."},
    "wmt14_en_fr": {"en": "That is good.", "fr": "C'est bien."},
    "wmt15_en_fr": {"en": "Thank you.", "fr": "Merci."},
    "wmt16_en_ro": {"en": "Thank you.", "ro": "Mulțumesc."},
    "wmt19_en_de": {"en": "Good morning.", "de": "Guten Morgen."},
    "wmt14_de_en": {"en": "That is good.", "de": "Das ist gut."},
    "wmt16_ro_en": {"en": "Thank you.", "ro": "Mulțumesc."},
    "cnn_dailymail": {
        "article": "A ship ran aground near Oslo on Monday. Nobody was hurt.",
        "highlights": "Ship runs aground .\nNobody hurt .",
        "publisher": "cnn",
        "id": "1",
    },
    "xsum": {"document": "A ship ran aground near Oslo.", "summary": "A ship has run aground."},
    "natural_instructions": {
        "id": "task1-1",
        "input": "The soup was cold.",
        "output": "negative",
        "source": "train",
        "task_name": "task1",
        "definition": "Say whether the review is positive or negative.",
    },
}

# As JSON Lines or Parquet of Hugging Face have them, where that differs or TFDS has none.
HUGGING_FACE: dict[str, Any] = {
    "bool_q": {"question": "is a whale a fish", "answer": False, "passage": "Whales are mammals."},
    **{
        f"anli_r{i}": {
            "uid": "a2",
            "premise": "Oslo lies at the end of a fjord.",
            "hypothesis": "Oslo lies by the water.",
            "label": 0,
            "reason": "A fjord is an arm of the sea.",
        }
        for i in (1, 2, 3)
    },
    "gsm8k": {"question": "What is 2+3?", "answer": "It is 2+3=<<2+3=5>>5.\n#### 5"},
    "mmlu": {
        "question": "Which gas do plants take in?",
        "subject": "high_school_biology",
        "choices": ["oxygen", "carbon dioxide", "helium", "neon"],
        "answer": 1,
    },
    "hellaswag": {
        "ind": 4,
        "activity_label": "Sailing",
        "ctx_a": "A man pulls a rope.",
        "ctx_b": "he",
        "ctx": "A man pulls a rope. he",
        "endings": ["sets the sail.", "reads.", "cooks.", "sings."],
        "source_id": "activitynet~1",
        "split": "val",
        "split_type": "indomain",
        "label": "0",
    },
    "truthful_qa": {
        "question": "Can fish drown?",
        "mc1_targets": {
            "choices": ["Yes, without oxygen", "No", "Only at night"],
            "labels": [1, 0, 0],
        },
        "mc2_targets": {
            "choices": ["Yes, without oxygen", "Fish need oxygen", "No", "Never"],
            "labels": [1, 1, 0, 0],
        },
    },
    "wmt14_en_de": {"translation": {"en": "That is good.", "de": "Das ist gut."}},
    "p3": {
        "answer_choices": ["negative", "positive"],
        "inputs": [1, 2],
        "inputs_pretokenized": "I liked it. Is this review positive or negative? ",
        "targets": [3],
        "targets_pretokenized": "\npositive",
    },
    "natural_instructions": {
        "task_name": "task2",
        "id": "task2-9",
        "definition": "Give the plural of the noun.",
        "inputs": "boat",
        "targets": "boats",
    },
}

# A task file of the repository of Super-NaturalInstructions, shortened.
NATURAL_INSTRUCTIONS = {
    "Contributors": ["A. N. Other"],
    "Source": ["synthetic"],
    "Categories": ["Word Semantics"],
    "Definition": ["Give the opposite of the word."],
    "Positive Examples": [
        {"input": "hot", "output": "cold", "explanation": "Cold is what is not hot."},
        {"input": "up", "output": "down", "explanation": "They point away from each other."},
    ],
    "Negative Examples": [{"input": "big", "output": "large", "explanation": "That is the same."}],
    "Instances": [
        {"id": "task3-1", "input": "wet", "output": ["dry"]},
        {"id": "task3-2", "input": "fast", "output": ["slow", "sluggish"]},
    ],
}


def all_examples(form: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Every collection's examples as a list."""
    return {name: made if isinstance(made, list) else [made] for name, made in form.items()}
