"""The steps of `resolve`: what adapts, what conflicts, in which order, and how it reads."""
