"""The Linux Test Project's tests of system calls, natively and in machines."""
