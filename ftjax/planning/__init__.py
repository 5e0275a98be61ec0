"""How much memory a training step needs and how fast it can be, from compiling it for devices that need not exist."""
