"""Classes of other libraries that train with Partita: one package for each library, imported when it is used."""
