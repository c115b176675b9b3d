"""The one error that people are to see: a line that says what is wrong, where, and what to do. bench.py exits with 2."""


class UserError(Exception):
    """Wrong use; the message is one line."""
