"""Classification of texts: labelled texts, models, evaluation."""
