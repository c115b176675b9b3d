"""Errors: the one that people are to see (a line that says what is wrong, where, and what to do; bench.py exits with 2)."""

import pickle


class UserError(Exception):
    """Wrong use; the message is one line."""


def portable(error: Exception) -> Exception:
    """The error itself if it survives the way to another process, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
