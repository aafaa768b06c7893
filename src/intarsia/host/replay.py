"""Gradient checkpointing that recomputes under the expression of the forward.

The backward of a checkpointed block runs its forward again, in whatever context the backward has (on a GPU: in a thread
of autograd's, which inherits no ContextVar).  A `Pinned` checkpoint function captures the call in the forward and
reinstates it in the recomputation; without it gradients would silently belong to another expression.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

from intarsia.host.call import CALLS, State, thread


class Pinned:
    """A drop-in for the function transformers stores as `_gradient_checkpointing_func`.

    Always the non-reentrant kind: the reentrant one gives no gradient at all when the block's inputs need none, which is
    the rule under a frozen base.
    """

    def __init__(self, state: State, original: Callable[..., Any]) -> None:
        self.state = state
        self.original = original

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.state.current()
        state = self.state
        given = dict(state.noted())

        def run(*inner: Any, **named: Any) -> Any:
            if call is None:
                return function(*inner, **named)
            token = CALLS.set({**CALLS.get(), state: call})
            before = state.given.get(thread())
            state.given[thread()] = given
            try:
                return function(*inner, **named)
            finally:
                CALLS.reset(token)
                if before is None:
                    state.given.pop(thread(), None)
                else:
                    state.given[thread()] = before

        original = self.original
        if isinstance(original, Pinned):  # another host on the same model: both pin
            return original(run, *args, **kwargs)
        options = dict(original.keywords) if isinstance(original, functools.partial) else {}
        options.update(kwargs)
        options["use_reentrant"] = False
        return checkpoint(run, *args, **options)
