"""The messages of the control protocol."""
