"""The exceptions about what is in a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint that is not there, not whole, or of something else.

    The message is one line. It names the folder, the file, the tensor and the byte range, and says what to do.
    """


class DamagedError(CheckpointError):
    """A checkpoint that was changed after it was saved, as its key shows."""
