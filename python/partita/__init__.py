"""Partita: ZeRO data parallelism and mixed precision for PyTorch, on a native core."""
