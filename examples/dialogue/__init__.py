"""Chat fine-tuning: dialogues, packed rows, generation, scores, rounds of self-training."""
