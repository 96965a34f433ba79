"""Imports of libraries without what they import for users of something else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Within the block, these modules cannot be imported, unless they are imported already.

    For libraries that do without an optional one: where that is installed for other reasons, its
    import would take seconds of every start.
    """
    hidden: dict[str, Any] = {name: None for name in names if name not in sys.modules}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
