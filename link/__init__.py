"""The carrier between two members of a cluster."""
