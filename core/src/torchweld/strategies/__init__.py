"""The strategies that core offers: one process, and one copy in each of several."""
