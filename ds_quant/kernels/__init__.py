"""Fused optimizer steps (see `dispatch`) and gradients on the wire (see `wire`): C++ for CPUs, built on first use."""
