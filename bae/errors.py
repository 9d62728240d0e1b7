"""Define the error for what a person can mend, so that every room can raise it."""


class UserError(Exception):
    """Say what the user can mend: one sentence with what, where and how. A command prints it, and exits with 1."""
