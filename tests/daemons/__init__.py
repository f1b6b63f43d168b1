"""The daemons that the tests run on: their pinned versions and their features."""
