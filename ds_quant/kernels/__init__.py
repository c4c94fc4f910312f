"""Fused optimizer steps: C++ for CPUs, built on first use, and the reference that defines them. See `dispatch`."""
