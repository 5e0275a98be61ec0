"""What a training step will need and how fast it can be, from compiling it for devices that are not there."""
