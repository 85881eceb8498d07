"""Where the data of the examples come from."""
