"""API compatibility layers for p2pclient and hivemind, and ``install()``, which activates them."""
