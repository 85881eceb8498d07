"""Programs written for another engine, run by Partita: one package for each engine, under its own names."""
