"""Define the errors that every room can raise: what a person can mend, and what did not answer."""


class UserError(Exception):
    """Say what the user can mend: one sentence with what, where and how. A command prints it, and exits with 1."""


class NoAnswer(Exception):
    """Say that what was asked did not answer, or not in a form that can be read. It is not taken for a low score."""
