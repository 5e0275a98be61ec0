"""What a run is: state, step, loop, checkpoints, metrics."""
