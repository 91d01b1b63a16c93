"""The error that users see as one sentence."""


class LlamaExtError(Exception):
    """Bad input or a failed file operation: one sentence for the user, no traceback in the CLI."""
