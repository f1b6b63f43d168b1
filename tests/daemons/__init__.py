"""The daemons that the tests run on: what pins them, and what each of them can do."""
