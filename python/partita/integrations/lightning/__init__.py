"""Lightning over Partita."""
