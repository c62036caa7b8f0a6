"""QEMU as the peer: a boot ROM that runs the sample guest's loop, and the harness that drives it."""
