"""What every training shares: session, loop, batches, checkpoints, output."""
