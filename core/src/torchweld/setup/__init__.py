"""From a Trainer's arguments to a run that can take its first step."""
