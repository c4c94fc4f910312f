"""Fused steps of AdamW. `ops` is what the optimizer calls, `work` what it passes."""
