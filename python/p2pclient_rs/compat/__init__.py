"""What ``install()`` is made of: known versions, the import hook, class replacement, children."""
