"""What the commands share, with one another and with programs around them: texts, tables, checkpoints as models."""
