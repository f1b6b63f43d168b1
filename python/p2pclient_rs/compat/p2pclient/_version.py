"""The version of p2pclient whose API this is."""

__version__ = "0.3.0"
