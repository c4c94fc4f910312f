"""What a training job will need, found out by running its own code without arithmetic."""
