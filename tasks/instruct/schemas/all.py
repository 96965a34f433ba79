"""All collections by name."""

from tasks.instruct.register import Collection
from tasks.instruct.schemas import answer, choose, classify, instructions, write

COLLECTIONS: dict[str, Collection] = (
    classify.COLLECTIONS
    | answer.COLLECTIONS
    | choose.COLLECTIONS
    | write.COLLECTIONS
    | instructions.COLLECTIONS
)
