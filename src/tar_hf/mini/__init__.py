"""tar-mini: a whole Tar system small enough to train on a laptop, in a procedurally drawn world."""
