"""The version that programs are told."""

from __future__ import annotations

__version__ = "0.19.8+partita"
"""DeepSpeed's release with which the names here are compared, and a label that says who answers."""
