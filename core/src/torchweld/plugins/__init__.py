"""Which plugins are installed, what they offer, and what a user's choice means."""
