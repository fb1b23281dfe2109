"""The base of errors that a user can act on. Imports nothing."""


class UserError(Exception):
    """An error whose message names the cause and the fix; the command line prints it without a traceback."""
