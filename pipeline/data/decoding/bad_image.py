"""The error for a file that is no picture. No other import, since the process of decoder_process.py starts with it."""


class BadImage(Exception):  # noqa: N818 (it is the image that is bad)
    """The bytes cannot be decoded to a picture. `reason` is one line for the log."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
