"""The training loop: batches and steps within, everything else at its borders."""
