"""Steps of optimizers that treat each element by itself. `ops` is what they call, `work` what they pass."""
