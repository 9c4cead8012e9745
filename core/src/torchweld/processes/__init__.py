"""Several processes that start together, agree, and end together."""
