"""Language models: their text, tokens, training, results and evaluation."""
